"""The cache of a pass, under the names that releases of transformers have for it."""

from __future__ import annotations

from typing import Any

import pytest

from prism_plan.errors import InputError
from prism_plan.profiling.recording.decoder_cache import cache_argument, cache_of


class Before:
    """A decoder as up to transformers 5.23."""

    def forward(self, input_ids: Any, past_key_values: Any = None) -> None:
        """One pass."""


class Between(Before):
    """A decoder that takes both, and warns of the older one."""

    def forward(self, input_ids: Any, past_key_values: Any = None, cache: Any = None) -> None:
        """One pass."""


class After(Before):
    """A decoder as from 5.40 on."""

    def forward(self, input_ids: Any, cache: Any = None) -> None:  # type: ignore[override]
        """One pass."""


class Unknown(Before):
    """A decoder of a release that nobody knows yet."""

    def forward(self, input_ids: Any, memory: Any = None) -> None:  # type: ignore[override]
        """One pass."""


@pytest.mark.parametrize(
    ("decoder", "name"), [(Before, "past_key_values"), (Between, "cache"), (After, "cache")]
)
def test_the_name_that_a_decoder_wants(decoder: Any, name: str) -> None:
    """The newer name wherever a decoder takes it, so that none warns of the older one."""
    assert cache_argument(decoder()) == name


def test_a_name_that_is_not_known_is_refused() -> None:
    """The message tells what the decoder takes, and the names that are known."""
    with pytest.raises(
        InputError, match="Unknown: takes input_ids, memory; expected a cache as cache or past"
    ):
        cache_argument(Unknown())


def test_a_cache_is_found_under_either_name() -> None:
    """One of two names; none is no cache, and two are refused."""
    for name in ("cache", "past_key_values"):
        assert cache_of({"input_ids": 1, name: "it"}) == "it"
    assert cache_of({"cache": None, "past_key_values": None}) is None
    with pytest.raises(InputError, match="two caches, as cache and as past_key_values"):
        cache_of({"cache": 1, "past_key_values": 2})


def test_the_installed_transformers(recwarn: pytest.WarningsRecorder) -> None:
    """Its decoders take the name that is asked for without a warning, and go on from the cache."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.profiling.recording.families import FAMILIES, tiny_model

    model = tiny_model(FAMILIES[0])
    name = cache_argument(model.get_decoder())
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        whole = model(input_ids=ids).logits[:, -1]
        cache = model(input_ids=ids[:, :2], use_cache=True)[name]
        last = model(input_ids=ids[:, 2:], **{name: cache}).logits[:, -1]
    assert torch.allclose(whole, last, atol=1e-5)
    assert cache_of({name: cache}) is cache
    assert not [one for one in recwarn if "cache" in str(one.message)]
