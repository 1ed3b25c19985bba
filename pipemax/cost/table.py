"""`TableCostModel`: as the roofline, with the GEMM time of a layer read from a measured table where there is one.

Tables lie beside this module as JSON, one file a GPU, with their source. What is not a GEMM comes from the roofline.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np

from pipemax.cost.hardware import HardwareProfile
from pipemax.cost.model import CostModel
from pipemax.cost.roofline import RooflineCostModel
from pipemax.model_spec import ModelSpec

_TABLE_FILES = ("h100_sxm_gemm.json", "h200_gemm.json")


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What the GEMMs of a dense decoder layer depend on."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class GemmTable:
    """Measured GEMM time of one layer, on one GPU, against the tokens in a step (ascending)."""

    gpu_name: str
    dtype_bytes: int
    layer: LayerShape
    num_tokens: tuple[int, ...]
    layer_seconds: tuple[float, ...]

    def seconds(self, num_tokens: int) -> float:
        """Linear between the points, in proportion beyond the last one."""
        last = self.num_tokens[-1]
        if num_tokens > last:
            return self.layer_seconds[-1] * num_tokens / last
        return float(np.interp(num_tokens, self.num_tokens, self.layer_seconds))


@cache
def _tables() -> tuple[GemmTable, ...]:
    tables = []
    for name in _TABLE_FILES:
        data = json.loads(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))
        for table in data["tables"]:
            shape = LayerShape(
                table["hidden_size"],
                table["intermediate_size"],
                table["num_heads"],
                table["num_kv_heads"],
                table["head_dim"],
            )
            seconds = tuple(microseconds * 1e-6 for microseconds in table["layer_microseconds"])
            tables.append(GemmTable(data["gpu"], data["dtype_bytes"], shape, tuple(table["num_tokens"]), seconds))
    return tuple(tables)


def gemm_table(model: ModelSpec, gpu: HardwareProfile, *, dtype_bytes: int) -> GemmTable | None:
    """The table measured for layers of this shape on this GPU, or None. Models with experts have none."""
    if model.num_experts:
        return None
    shape = LayerShape(model.hidden_size, model.intermediate_size, model.num_heads, model.num_kv_heads, model.head_dim)
    for table in _tables():
        if (table.gpu_name, table.layer, table.dtype_bytes) == (gpu.name, shape, dtype_bytes):
            return table
    return None


class TableCostModel(RooflineCostModel):
    """Implements `CostModel`. The table is of whole layers: one of `shards` GPUs takes its share of that time."""

    def __init__(
        self,
        *,
        table: GemmTable,
        model: ModelSpec,
        gpu: HardwareProfile,
        kv_dtype_bytes: int = 2,
        shards: int = 1,
        kv_read_fraction: float | None = None,
    ) -> None:
        super().__init__(
            model=model,
            gpu=gpu,
            dtype_bytes=table.dtype_bytes,
            kv_dtype_bytes=kv_dtype_bytes,
            shards=shards,
            kv_read_fraction=kv_read_fraction,
        )
        self._table = table

    def _layer_gemm_seconds(self, tokens: int) -> float:
        return self._table.seconds(tokens) / self._shards


def best_cost_model(
    *,
    model: ModelSpec,
    gpu: HardwareProfile,
    dtype_bytes: int = 2,
    kv_dtype_bytes: int = 2,
    shards: int = 1,
    kv_read_fraction: float | None = None,
) -> CostModel:
    """The table's model where a table fits, else the roofline's."""
    table = gemm_table(model, gpu, dtype_bytes=dtype_bytes)
    if table is None:
        return RooflineCostModel(
            model=model,
            gpu=gpu,
            dtype_bytes=dtype_bytes,
            kv_dtype_bytes=kv_dtype_bytes,
            shards=shards,
            kv_read_fraction=kv_read_fraction,
        )
    return TableCostModel(
        table=table,
        model=model,
        gpu=gpu,
        kv_dtype_bytes=kv_dtype_bytes,
        shards=shards,
        kv_read_fraction=kv_read_fraction,
    )
