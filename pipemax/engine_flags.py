"""Command line flags of an engine, made from the fields of `EngineConfig`.

Names, types and defaults come from the dataclass; here is only what a dataclass cannot say: the text, the panel of the
help page, short names. Any command that starts an engine takes them with `@with_engine_flags`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from pipemax.config import EngineConfig

_MODEL = "Model"
_PIPELINE = "Pipeline and batches"
_SWITCHES = "Switches"
_KV = "KV cache"
_GPU = "GPUs"


@dataclasses.dataclass(frozen=True, slots=True)
class _Flag:
    """`unit` is what the help page shows as the value; `default` says in words what None stands for.

    `choices` is a Literal where the field is a plain string.
    """

    panel: str
    unit: str | None
    text: str
    default: str | None = None
    short: tuple[str, ...] = ()
    choices: Any = None


_FLAGS = {
    "model": _Flag(_MODEL, "PATH", "Folder of a Hugging Face model (config.json and safetensors), or a .gguf file."),
    "tokenizer": _Flag(_MODEL, "PATH", "Folder of the tokenizer.", default="the model's folder"),
    "trust_remote_code": _Flag(_MODEL, None, "Run Python code that the model's folder brings along."),
    "load_format": _Flag(
        _MODEL, "FORMAT", "auto reads the weights; dummy draws random ones and needs config.json only."
    ),
    "dtype": _Flag(
        _MODEL,
        "TYPE",
        "Of weights, activations and KV: auto (the checkpoint's; on GPUs bfloat16 in the place of float32), float32, "
        "bfloat16 or float16.",
        choices=Literal["auto", "float32", "bfloat16", "float16"],
    ),
    "max_model_len": _Flag(_MODEL, "TOKENS", "Longest prompt and answer together.", default="the model's positions"),
    "seed": _Flag(_MODEL, "N", "Seed of rows that bring none."),
    "device": _Flag(
        _PIPELINE,
        "DEVICE",
        "cpu, cuda or auto, which is cuda where there is a GPU.",
        choices=Literal["auto", "cpu", "cuda"],
    ),
    "pipeline_parallel_size": _Flag(
        _PIPELINE, "N", "Pipeline stages, each a process with a GPU of its own.", short=("-pp",)
    ),
    "data_parallel_size": _Flag(
        _PIPELINE,
        "R",
        "Pipelines, each with GPUs of its own: R times the stages. Rows go to whichever has room.",
        short=("-dp",),
    ),
    "num_batches": _Flag(_PIPELINE, "N", "Batches in flight.", default="one a stage"),
    "max_num_seqs": _Flag(
        _PIPELINE,
        "ROWS",
        "Most rows in one step of one batch.",
        default="256; on GPUs up to 1,024, as many as their memory has KV for",
    ),
    "max_num_batched_tokens": _Flag(_PIPELINE, "TOKENS", "Most prompt tokens in one prefill step."),
    "threads_per_stage": _Flag(_PIPELINE, "N", "CPU threads of a stage.", default="cores divided by stages"),
    "stall_seconds": _Flag(
        _PIPELINE,
        "SECONDS",
        "A pipeline in which nothing gets on for so long is ended, with the stacks of its processes.",
    ),
    "async_scheduling": _Flag(_SWITCHES, None, "Plan a batch's next step before the tokens of its last one are known."),
    "phase_policy": _Flag(
        _PIPELINE,
        "POLICY",
        "How prefill and decode share the steps: mixed, disaggregated or auto, which is the one that is expected to be "
        "faster.",
    ),
    "kv_offload": _Flag(
        _KV,
        "MODE",
        "on keeps KV of waiting batches in host memory, off does not; auto is on where host memory has room for more "
        "of it than the GPUs.",
    ),
    "block_size": _Flag(_KV, "TOKENS", "Tokens in a KV block."),
    "num_device_blocks": _Flag(
        _KV, "BLOCKS", "KV blocks on each device, window included.", default="from the device's memory"
    ),
    "num_window_blocks": _Flag(
        _KV,
        "BLOCKS",
        "Of those, blocks that are refilled from host memory for the next batch.",
        default="an eighth, 0 with one batch",
    ),
    "host_memory_gib": _Flag(
        _KV,
        "GIB",
        "Host memory for KV blocks, all stages of all pipelines together.",
        default="of what is free 40 %, without GPUs a quarter",
    ),
    "gpu_memory_utilization": _Flag(
        _GPU, "SHARE", "Of each GPU's memory, what weights, KV cache and the rest may take together."
    ),
    "attention_backend": _Flag(
        _GPU, "BACKEND", "auto is flashinfer in half precision where it is installed; reference is plain torch."
    ),
    "fused_layers": _Flag(_SWITCHES, None, "On GPUs: merged GEMMs and fused operations, for families that have them."),
    "cuda_graphs": _Flag(_SWITCHES, None, "On GPUs: run small steps from CUDA graphs; needs fused layers."),
}

# A batch file is text: what works without a tokenizer is the Python API. GPUs are chosen by CUDA_VISIBLE_DEVICES;
# stages that share one are for tests.
_NOT_FLAGS = frozenset({"skip_tokenizer_init", "stage_devices"})


def with_engine_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces the parameter `engine: dict` of a command by one flag for each engine setting.

    The command gets the settings in that dict, under the names of `EngineConfig`, unchecked.
    """

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        engine = {name: arguments.pop(name) for name in _FLAGS}
        command(engine=engine, **arguments)

    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "engine"]
    run.__signature__ = signature.replace(parameters=[*own, *_parameters()])  # type: ignore[attr-defined]
    return run


def _parameters() -> list[inspect.Parameter]:
    fields = {field.name: field for field in dataclasses.fields(EngineConfig)}
    assert set(fields) == set(_FLAGS) | _NOT_FLAGS, "every field of EngineConfig is a flag, or says why not"
    types = typing.get_type_hints(EngineConfig)
    return [_parameter(fields[name], types[name], flag) for name, flag in _FLAGS.items()]


def _parameter(field: dataclasses.Field[Any], field_type: Any, flag: _Flag) -> inspect.Parameter:
    long = "--" + field.name.replace("_", "-")
    names = [f"{long}/--no-{long[2:]}" if field_type is bool and field.default is True else long]
    option = typer.Option(
        *names,
        *flag.short,
        help=flag.text,
        metavar=flag.unit,
        rich_help_panel=flag.panel,
        show_default=True if flag.default is None else flag.default,
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
        annotation=Annotated[flag.choices or field_type, option],
    )
