"""Commits, each installed in a virtual environment of its own. Needs nothing but Python and git."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PIP_FLAGS = ("--quiet", "--disable-pip-version-check")


@dataclass(frozen=True)
class Revision:
    """A commit, or (with ``commit`` empty) the working tree: all that git does not ignore."""

    commit: str = ""

    def __str__(self) -> str:
        return self.commit[:10] or "the working tree"

    def copy_to(self, folder: Path, root: Path = ROOT) -> None:
        """Write the files of the commit, or of the working tree, into a new folder.

        ``root`` is the root of the repository.
        """
        folder.mkdir(parents=True)
        if self.commit:
            packed = BytesIO(git("archive", self.commit, root=root))
            with tarfile.open(fileobj=packed) as archive:
                archive.extractall(folder, filter="data")
            return
        listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", root=root)
        for name in filter(None, listed.decode().split("\0")):
            if (root / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, folder / name)


def revision(name: str, root: Path = ROOT) -> Revision:
    """The commit that git knows by the name, in the repository at ``root``.

    Raises
    ------
    SystemExit
        There is none.

    """
    try:
        return Revision(
            git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", root=root)
            .decode()
            .strip()
        )
    except subprocess.CalledProcessError:
        sys.exit(f"{name!r} is no commit of this repository")


def git(*words: str, root: Path = ROOT) -> bytes:
    """The output of a git command at the root of the repository."""
    return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True).stdout


def install(revisions: list[Revision], folder: Path, extras: str) -> list[Path]:
    """Install each revision below the folder, all at once; returns their Pythons.

    Raises
    ------
    SystemExit
        An installation failed; pip has said why.

    """
    started = []
    for number, one in enumerate(revisions):
        source, made = folder / f"source-{number}", folder / f"venv-{number}"
        one.copy_to(source)
        subprocess.run([sys.executable, "-m", "venv", str(made)], check=True)
        wanted = f"{source}[{extras}]" if extras else str(source)
        constraints = source / ".ci" / "constraints.txt"
        given = ["-c", str(constraints)] if constraints.exists() else []
        command = [str(made / "bin" / "pip"), "install", *PIP_FLAGS, *given, wanted]
        started.append((one, made, subprocess.Popen(command, stderr=subprocess.PIPE)))
    pythons = []
    for one, made, process in started:
        _, told = process.communicate()
        if process.returncode:
            sys.stderr.write(told.decode("utf-8", "replace"))
            sys.exit(f"{one} cannot be installed")
        pythons.append(made / "bin" / "python")
    return pythons
