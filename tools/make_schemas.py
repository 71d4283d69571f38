"""The JSON Schemas of our formats: made from the models, and shipped in ``prism_plan/schemas``.

``python -m tools.make_schemas`` writes those files anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema
from pydantic_core.core_schema import WithDefaultSchema

import prism_plan
from prism_plan.io.arrivals import ArrivalLine
from prism_plan.io.calibration import CalibrationFile
from prism_plan.io.cluster import ClusterFile
from prism_plan.io.comparison import ComparisonFile
from prism_plan.io.endpoints import EndpointsFile
from prism_plan.io.export import ExportFile
from prism_plan.io.migration import MigrationFile
from prism_plan.io.model_spec import SpecPart
from prism_plan.io.phases import PhasesFile
from prism_plan.io.placement import PlacementFile, PlacementFile2
from prism_plan.io.prompts import PromptLine
from prism_plan.io.pydantic_base import FormatModel
from prism_plan.io.serve_requests import RequestLine
from prism_plan.io.simulation import SimulationFile

FOLDER = Path(prism_plan.__file__).parent / "schemas"
#: Of a file, or of one line of a file of JSON Lines.
MODELS: dict[str, type[FormatModel]] = {
    "arrivals-1": ArrivalLine,
    "calibration-1": CalibrationFile,
    "cluster-1": ClusterFile,
    "comparison-1": ComparisonFile,
    "endpoints-1": EndpointsFile,
    "export-1": ExportFile,
    "migration-1": MigrationFile,
    "model-spec-1": SpecPart,
    "phases-1": PhasesFile,
    "placement-1": PlacementFile,
    "placement-2": PlacementFile2,
    "prompts-1": PromptLine,
    "requests-1": RequestLine,
    "simulation-1": SimulationFile,
}


class _Plain(GenerateJsonSchema):
    """Without titles, which repeat the keys, and without ``"default": null``."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: WithDefaultSchema) -> dict[str, Any]:
        found = super().default_schema(schema)
        return {key: value for key, value in found.items() if (key, value) != ("default", None)}


def schema_text(name: str) -> str:
    """The text of the file ``<name>.json``."""
    values = MODELS[name].model_json_schema(schema_generator=_Plain)
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"prism-plan/{name.replace('-', '/')}",
    }
    return json.dumps(head | values, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name in MODELS:
        (FOLDER / f"{name}.json").write_text(schema_text(name), encoding="utf-8")
