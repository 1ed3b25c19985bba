"""`LLM`: the offline API, shaped after vLLM's. The composition root of a pipeline on this machine.

    LLM.generate / chat / stream
        GenerationRequest ──tokenize──► RequestState ──► Engine ──► tokens ──OutputProcessor──► RequestOutput

Here the settings are read, the parts are built and wired, and user-side requests become scheduler requests. No
scheduling, no tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pipemax.config import ConfigError, EngineConfig, KVOffload
from pipemax.control_plane import build_scheduler
from pipemax.cost.forecast import Forecast
from pipemax.cost.load import stages_of
from pipemax.cost.table import best_cost_model
from pipemax.engine import Engine, EngineUpdate
from pipemax.engine_stats import EngineStats
from pipemax.executor.process import ProcessExecutor
from pipemax.local_hardware import this_server
from pipemax.model_spec import ModelSpec
from pipemax.observer import EngineObserver
from pipemax.output_processor import OutputProcessor
from pipemax.plan import Capacity, Phase
from pipemax.request import FinishReason, GenerationError, RequestError, RequestOutput, SamplingParams
from pipemax.scheduling.request_state import RequestState
from pipemax.shape_choice import choose_shape
from pipemax.text_generator import GenerationRequest, Message, TextGenerator
from pipemax.tokenization import Tokenizer
from pipemax.worker.gguf import cached_gguf_folder

__all__ = ["LLM", "EngineStats", "GenerationRequest", "Message"]


class LLM(TextGenerator):
    """A model on this machine, ready to generate.

    Parameters are the fields of `EngineConfig`. Raises ConfigError when the settings, the model's files or the memory
    cannot work (nothing is left running then); `ExecutorError` comes out of the generating calls when a stage fails.
    Use it as a context manager, or call `shutdown()`; the stages also end with this process.
    """

    def __init__(self, model: str | Path, **settings: Any) -> None:
        unknown = set(settings) - set(EngineConfig.__dataclass_fields__)
        if unknown:
            raise ConfigError(f"unknown setting {sorted(unknown)[0]!r}; EngineConfig lists what there is")
        config = EngineConfig(model=str(model), **settings)
        if config.data_parallel_size != 1:
            raise ConfigError(
                "an LLM is one pipeline; for data_parallel_size above 1 use pipemax.Replicas, which has the same calls"
            )
        folder = Path(config.model)
        self.model_name = folder.name
        if folder.suffix == ".gguf":
            folder = cached_gguf_folder(folder)
        spec = ModelSpec.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        self._seed = config.seed
        self._tokenizer = self._load_tokenizer(config, folder)
        num_batches = config.num_batches or config.pipeline_parallel_size
        model_len = _max_model_len(config, spec)
        self._executor = ProcessExecutor.start(
            model_dir=folder,
            spec=spec,
            num_stages=config.pipeline_parallel_size,
            num_batches=num_batches,
            device=config.device,
            dtype=config.dtype,
            seed=config.seed,
            load_format=config.load_format,
            trust_remote_code=config.trust_remote_code,
            block_size=config.block_size,
            num_device_blocks=config.num_device_blocks,
            num_window_blocks=config.num_window_blocks,
            host_memory_gib=config.host_memory_gib,
            max_model_len=config.max_model_len,
            max_num_batched_tokens=config.max_num_batched_tokens,
            kv_offload=config.kv_offload,
            threads_per_stage=config.threads_per_stage,
            stall_seconds=config.stall_seconds,
            cuda=config.cuda_options,
            choose_shape=partial(
                choose_shape,
                spec,
                num_stages=config.pipeline_parallel_size,
                num_batches=num_batches,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                block_size=config.block_size,
                kv_offload=config.kv_offload,
                gpu_memory_utilization=config.gpu_memory_utilization,
            ),
        )
        capacity = self._executor.capacity
        self.max_num_seqs = self._executor.shape.max_num_seqs
        scheduler = build_scheduler(
            capacity=capacity,
            num_batches=num_batches,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            async_scheduling=config.async_scheduling,
            phase_policy=config.phase_policy,
            kv_offload=KVOffload.ON if capacity.num_host_blocks else KVOffload.OFF,
            forecast=self._forecast(spec),
        )
        # A request that is longer than either pool could never run, whatever the model allows.
        self.max_model_len = min(model_len, scheduler.max_blocks_per_request * capacity.block_size)
        self._max_queued = 2 * num_batches * self.max_num_seqs
        self._engine = Engine(scheduler=scheduler, executor=self._executor)
        self._outputs = OutputProcessor(tokenizer=self._tokenizer)
        self._started_seconds = self._executor.now()
        self._next_id = 0
        self._streaming = False
        self._dropping_queued = False

    # -- generating ----------------------------------------------------------------------------------------------------

    def stream(self, requests: Iterable[GenerationRequest | None]) -> Iterator[RequestOutput]:
        """See `TextGenerator`. One stream at a time. Raises ExecutorError when a stage fails."""
        if self._streaming:
            raise RuntimeError("this LLM is generating already: finish or close the other stream first")
        self._streaming = True
        live: dict[int, _Live] = {}
        source = iter(requests)
        exhausted = False
        population = self._engine.scheduler.population
        try:
            while live or not exhausted:
                if self._dropping_queued:
                    self._drop_queued(live)
                while not exhausted and len(population.waiting) < self._max_queued:
                    try:
                        request = next(source)
                    except StopIteration:
                        exhausted = True
                        break
                    if request is None:
                        break
                    failed = self._submit(request, live)
                    if failed is not None:
                        yield failed
                if live:
                    for update in self._engine.step():
                        output = self._take(update, live)
                        if output is not None:
                            yield output
        finally:
            for request_id in live:
                self._engine.finish_request(request_id, is_complete=False)
                self._outputs.drop(request_id)
            self._streaming = False

    def drop_queued(self) -> None:
        """Makes a running `stream` give up the requests that no batch has taken up: no output comes of them.

        Those that were prefilled ahead are among them: there may be thousands, with all their decoding before them.

        May be called from a signal handler.
        """
        self._dropping_queued = True

    # -- around --------------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        scheduler, capacity = self._engine.scheduler, self._executor.capacity
        stats = scheduler.stats
        return EngineStats(
            prompt_tokens=stats.prompt_tokens,
            output_tokens=stats.output_tokens,
            steps=sum(stats.steps.values()),
            prefill_steps=stats.steps[Phase.PREFILL],
            decode_steps=stats.steps[Phase.DECODE],
            blocks_sent_home=stats.blocks_sent_home,
            blocks_refilled=stats.blocks_refilled,
            requests_left_batch=scheduler.memory.num_left,
            requests_restarted=scheduler.memory.num_restarted,
            num_device_blocks=capacity.num_device_blocks,
            num_window_blocks=capacity.num_window_blocks,
            num_host_blocks=capacity.num_host_blocks,
            elapsed_seconds=self._executor.now() - self._started_seconds,
        )

    @property
    def start_up(self) -> list[list[dict[str, Any]]]:
        """By stage: name, seconds and device_bytes of each part of its start."""
        return [[dataclasses.asdict(part) for part in parts] for parts in self._executor.start_up]

    @property
    def engine(self) -> Engine:
        """The engine underneath, for those who measure or drive it themselves."""
        return self._engine

    def take_request_ids(self, count: int) -> int:
        """The first of that many ids that no request of this engine has or will get: for those who drive it."""
        first_id, self._next_id = self._next_id, self._next_id + count
        return first_id

    @property
    def vocab_size(self) -> int:
        """Prompt token ids are below this."""
        return self._executor.vocab_size

    @property
    def seed(self) -> int:
        return self._seed

    @property
    def capacity(self) -> Capacity:
        """KV blocks of this engine, by place."""
        return self._executor.capacity

    def observe(self, observer: EngineObserver) -> None:
        """From now on `observer` is told of every plan and result."""
        self._engine.observe(observer)

    def shutdown(self) -> None:
        """Ends the stages. Idempotent."""
        self._executor.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    # -- inner ---------------------------------------------------------------------------------------------------------

    def _forecast(self, spec: ModelSpec) -> Forecast:
        """Where estimates start; steps correct them."""
        shape = self._executor.shape
        server = this_server(self._executor.device, num_stages=len(shape.layers))
        return Forecast(
            cost=best_cost_model(model=spec, gpu=server.gpu),
            stages=stages_of(shape.layers, head=shape.head),
            link=server.host_link,
            block_bytes=self._executor.capacity.block_bytes,
        )

    @staticmethod
    def _load_tokenizer(config: EngineConfig, folder: Path) -> Tokenizer | None:
        if config.skip_tokenizer_init:
            return None
        source = Path(config.tokenizer) if config.tokenizer else folder
        return Tokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code, model_folder=folder)

    def _submit(self, request: GenerationRequest, live: dict[int, _Live]) -> RequestOutput | None:
        """Queues one request, or gives the output that says why not."""
        text = request.prompt if isinstance(request.prompt, str) else None
        request_id = self.take_request_ids(1)
        token_ids: list[int] = []
        try:
            token_ids = self._encode(request)
            state = self._state(request_id, request.request_id, token_ids, request.sampling_params)
            self._outputs.add(request_id, request.sampling_params, token_ids)
        except AssertionError:
            raise
        except Exception as raised:
            return RequestOutput(
                request_id=request.request_id,
                prompt=text,
                prompt_token_ids=token_ids,
                outputs=[],
                error=raised if isinstance(raised, RequestError) else _text_error(raised),
            )
        self._engine.add_request(state)
        live[request_id] = _Live(request.request_id, text, token_ids, request.sampling_params)
        return None

    def _drop_queued(self, live: dict[int, _Live]) -> None:
        self._dropping_queued = False
        population = self._engine.scheduler.population
        for state in [state for state in (*population.waiting, *population.ready) if state.num_outputs <= 1]:
            self._engine.finish_request(state.request_id, is_complete=False)
            self._outputs.drop(state.request_id)
            del live[state.request_id]

    def _encode(self, request: GenerationRequest) -> list[int]:
        if (request.prompt is None) == (request.messages is None):
            raise RequestError("give a prompt or messages, one of the two")
        if request.prompt is not None and not isinstance(request.prompt, str):
            return [int(token_id) for token_id in request.prompt]
        if self._tokenizer is None:
            raise RequestError("without a tokenizer (skip_tokenizer_init) prompts must be token ids", param="prompt")
        if request.messages is not None:
            return self._tokenizer.apply_chat_template(request.messages, **dict(request.chat_template_kwargs or {}))
        assert isinstance(request.prompt, str)
        return self._tokenizer.encode(request.prompt)

    def _default_seed(self, name: str) -> int:
        """The same for a request of that name in every run with this seed, wherever it comes in the stream."""
        digest = hashlib.blake2b(f"{self._seed}:{name}".encode(errors="surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    def _state(self, request_id: int, name: str, token_ids: list[int], sampling: SamplingParams) -> RequestState:
        if not token_ids:
            raise RequestError("the prompt is empty: there is no token to start from", param="prompt")
        vocab_size = self._executor.vocab_size
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            raise RequestError(f"prompt token ids must be in [0, {vocab_size - 1}]", param="prompt")
        room = self.max_model_len - len(token_ids)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens; with max_model_len {self.max_model_len} "
                f"at most {self.max_model_len - 1} leave room for an answer",
                param="prompt",
            )
        end_tokens = () if sampling.ignore_eos or self._tokenizer is None else self._tokenizer.eos_token_ids
        return RequestState(
            request_id=request_id,
            prompt_token_ids=np.array(token_ids, dtype=np.int32),
            sampling=sampling,
            seed=sampling.seed if sampling.seed is not None else self._default_seed(name),
            stop_token_ids=frozenset(end_tokens) | frozenset(sampling.stop_token_ids),
            max_outputs=room if sampling.max_tokens is None else min(room, sampling.max_tokens),
        )

    def _take(self, news: EngineUpdate, live: dict[int, _Live]) -> RequestOutput | None:
        """Takes a request's news in; its output if that ends it."""
        request_id = news.update.request_id
        error = None if news.update.error is None else GenerationError(news.update.error)
        if error is None:
            try:
                return self._take_token(news, live)
            except AssertionError:
                raise
            except Exception as raised:  # text libraries, at work on what a model made up
                error = _text_error(raised)
        self._engine.finish_request(request_id, is_complete=False)
        self._outputs.drop(request_id)
        return live.pop(request_id).output(error=error)

    def _take_token(self, news: EngineUpdate, live: dict[int, _Live]) -> RequestOutput | None:
        update = news.update
        request_id = update.request_id
        reason, stop_reason = update.finish_reason, update.stop_reason
        assert update.token_id is not None
        stop_string = self._outputs.append(request_id, update.token_id, news.logprobs)
        if reason is None and stop_string is None:
            return None
        request = live[request_id]
        if stop_string is not None and reason is not FinishReason.STOP:
            self._engine.finish_request(request_id, is_complete=True)
            completion = self._outputs.finish(request_id, FinishReason.STOP, stop_string)
        else:
            assert reason is not None
            # As in vLLM: a stop token is named only if the request asked for it, an end token is not.
            asked_for = stop_reason if stop_reason in request.sampling.stop_token_ids else None
            completion = self._outputs.finish(request_id, reason, asked_for)
        del live[request_id]
        output = request.output()
        output.outputs.append(completion)
        return output


@dataclasses.dataclass(frozen=True, slots=True)
class _Live:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    sampling: SamplingParams

    def output(self, *, error: RequestError | None = None) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id, prompt=self.prompt, prompt_token_ids=self.prompt_token_ids, error=error
        )


def _text_error(error: Exception) -> GenerationError:
    """What a tokenizer library threw at one request: that request's error."""
    first_line = (str(error).strip().splitlines() or [""])[0]
    return GenerationError(f"the tokenizer failed: {type(error).__name__}: {first_line}")


def _max_model_len(config: EngineConfig, spec: ModelSpec) -> int:
    if config.max_model_len is None:
        return spec.max_position_embeddings
    if config.max_model_len > spec.max_position_embeddings:
        raise ConfigError(
            f"max_model_len {config.max_model_len} is above the model's {spec.max_position_embeddings} positions"
        )
    return config.max_model_len
