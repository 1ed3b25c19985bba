"""Stages against the whole model: eleven families, one and three stages, ragged rows over shuffled pages."""

import contextlib

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from pipemax.attention.base import RowLayout
from pipemax.attention.reference import ReferenceAttention
from pipemax.config import ConfigError, LoadFormat
from pipemax.head_place import HeadPlace
from pipemax.model_spec import ModelSpec
from pipemax.worker.attention_hook import StepContext
from pipemax.worker.cuda_device import CudaDevice
from pipemax.worker.kv_store import KVStore
from pipemax.worker.model_slice import resolve_dtype
from pipemax.worker.stage_model import StageModel, StageSlice, split_layers
from tests.worker.families import FAMILIES, VOCAB_SIZE, save_model

CPU = torch.device("cpu")
BLOCK_SIZE = 4
NUM_SLOTS = 64


class NoFences:
    def __init__(self):
        self.entered = []

    def enter(self, layer):
        self.entered.append(layer)

    def leave(self, layer):
        assert self.entered[-1] == layer


class Pipeline:
    """Stages in one process, one after the other, over paged KV with shuffled slots."""

    def __init__(
        self,
        folder,
        num_stages,
        *,
        load_format=LoadFormat.AUTO,
        dtype="auto",
        seed=0,
        device=CPU,
        head=HeadPlace.LAST,
        allocate_home=None,
    ):
        self.stages, self.stores, self.device = [], [], device
        num_layers = ModelSpec.from_pretrained(folder).num_layers
        for stage, layers in enumerate(split_layers(num_layers, num_stages)):
            model = StageModel.load(
                model_dir=folder,
                stage=StageSlice(stage, num_stages, layers, head),
                load_format=load_format,
                dtype=dtype,
                device=device,
                seed=seed,
                trust_remote_code=False,
            )
            if model.stage.is_first and model.stage.shares_head and device.type == "cuda":
                model.move_embedding(allocate_home)
            self.stages.append(model)
            self.stores.append(
                KVStore(
                    geometry=model.spec.kv_geometry(block_size=BLOCK_SIZE, dtype_bytes=model.dtype.itemsize),
                    layers=layers,
                    num_device_blocks=NUM_SLOTS,
                    num_host_blocks=0,
                    dtype=model.dtype,
                    device=device,
                )
            )
        self.free = list(np.random.default_rng(0).permutation(NUM_SLOTS))
        self.pages = {}
        self.backend = ReferenceAttention(device)

    def step(self, rows):
        """rows: (request, context, token ids) each. Gives logits [T, V] of all new tokens."""
        new = [len(ids) for _, _, ids in rows]
        kv_lens = [context + len(ids) for _, context, ids in rows]
        for (request, _, _), length in zip(rows, kv_lens, strict=True):
            pages = self.pages.setdefault(request, [])
            while len(pages) * BLOCK_SIZE < length:
                pages.append(self.free.pop())
        tables = [self.pages[request] for request, _, _ in rows]
        self.backend.plan(
            RowLayout(
                np.cumsum([0, *new]).astype(np.int32),
                np.array(kv_lens, np.int32),
                np.cumsum([0, *map(len, tables)]).astype(np.int32),
                np.concatenate(tables).astype(np.int32),
                BLOCK_SIZE,
            )
        )
        positions = torch.cat([torch.arange(context, context + len(ids)) for _, context, ids in rows]).to(self.device)
        tokens, hidden = torch.cat([torch.as_tensor(ids) for _, _, ids in rows]).to(self.device), None
        for model, store in zip(self.stages, self.stores, strict=True):
            fences = NoFences()
            hidden = model.forward(
                input_ids_T=tokens if model.stage.is_first else None,
                hidden_TH=hidden,
                positions_T=positions,
                step_context=StepContext(self.backend, store, fences),
            )
            assert fences.entered == list(model.stage.layers)
        parts = [model.logits(hidden) for model in reversed(self.stages) if model.stage.has_head]
        return torch.cat(parts, dim=-1).cpu()


def last_of_rows(logits, rows):
    ends = np.cumsum([len(ids) for _, _, ids in rows]) - 1
    return logits[ends]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder_of(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = (folder, save_model(family, folder))
        return made[family]

    return folder_of


def cuda_or_skip():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return torch.device("cuda", 0)


@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_whole_model(folders, family, num_stages):
    run_against_the_whole_model(*folders(family), num_stages, device=CPU, tolerance=1e-5)


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_whole_model_with_half_of_the_head_on_either_end(folders, family, num_stages):
    folder, whole = folders(family)
    run_against_the_whole_model(folder, whole, num_stages, device=CPU, tolerance=1e-5, head=HeadPlace.ENDS)


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2: the head is tied, logits have a soft cap
def test_a_shared_head_is_held_once(folders, family):
    folder, whole = folders(family)
    tied = whole.config.tie_word_embeddings
    alone, shared = (Pipeline(folder, 2, head=head).stages for head in HeadPlace)
    matrix = whole.get_output_embeddings().weight
    rows = [len(model.stage.head_rows(VOCAB_SIZE)) for model in shared]
    assert sum(rows) == VOCAB_SIZE and min(rows) > 0
    row_bytes = matrix.element_size() * matrix.shape[1]
    storages = [{p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in held(model)} for model in shared]
    before = [sum(p.nbytes for p in {id(p): p for p in held(model)}.values()) for model in alone]
    # The first stage of a tied one has the embedding anyhow.
    gained = [0 if tied else rows[0] * row_bytes, -rows[0] * row_bytes]
    assert [sum(sizes.values()) for sizes in storages] == [b + g for b, g in zip(before, gained, strict=True)]


def held(model):
    return [*model._base.parameters(), *model._head.parameters()]


@pytest.mark.cuda
@pytest.mark.parametrize("head", list(HeadPlace))
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_whole_model_on_a_gpu(folders, family, head):
    folder, whole = folders(family)
    device = cuda_or_skip()
    with contextlib.closing(CudaDevice(device.index)) as cuda:
        settings = {"head": head, "dtype": "float32", "allocate_home": cuda.allocate_home}
        run_against_the_whole_model(folder, whole, 3, device=device, tolerance=1e-4, **settings)


def run_against_the_whole_model(folder, whole, num_stages, *, device, tolerance, **settings):
    assert len(list(folder.glob("*.safetensors"))) > 2
    pipeline = Pipeline(folder, num_stages, device=device, **settings)
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(3, VOCAB_SIZE, (n,), generator=generator) for n in (9, 17, 4)]

    def expected():
        with torch.no_grad():
            return [whole(input_ids=sequence[None]).logits[0] for sequence in sequences]

    whole_logits = expected()
    first, second = [], []
    for request, sequence in enumerate(sequences):
        half = len(sequence) // 2 + request % 2
        first.append((request, 0, sequence[:half]))
        second.append((request, half, sequence[half:]))
    # Two chunks of prefill, the second in another order of rows.
    logits = pipeline.step(first)
    wanted = torch.cat([whole_logits[r][: len(ids)] for r, _, ids in first])
    torch.testing.assert_close(logits, wanted, rtol=tolerance, atol=tolerance)
    second.reverse()
    logits = pipeline.step(second)
    wanted = torch.cat([whole_logits[r][context:] for r, context, _ in second])
    torch.testing.assert_close(logits, wanted, rtol=tolerance, atol=tolerance)

    rows = second
    for _ in range(6):
        tokens = last_of_rows(logits, rows).argmax(-1)
        for (request, _, _), token in zip(rows, tokens, strict=True):
            sequences[request] = torch.cat((sequences[request], token[None]))
        rows = [(request, len(sequences[request]) - 1, sequences[request][-1:]) for request in range(3)]
        logits = pipeline.step(rows)
        wanted = torch.stack([logits_of_row[-1] for logits_of_row in expected()])
        torch.testing.assert_close(logits, wanted, rtol=tolerance, atol=tolerance)
        assert torch.equal(logits.argmax(-1), wanted.argmax(-1))


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "sizes"),
    [
        (8, 1, [8]),
        (8, 4, [2, 2, 2, 2]),
        (5, 3, [2, 2, 1]),
        (7, 3, [2, 3, 2]),
        (9, 4, [2, 3, 2, 2]),
        (10, 4, [2, 3, 3, 2]),
        (80, 7, [11, 11, 12, 12, 12, 11, 11]),
        (3, 3, [1, 1, 1]),
    ],
)
def test_split_is_even_with_spare_layers_in_the_middle(num_layers, num_stages, sizes):
    ranges = split_layers(num_layers, num_stages)
    assert [len(layers) for layers in ranges] == sizes
    assert [layer for layers in ranges for layer in layers] == list(range(num_layers))


def test_more_stages_than_layers_is_refused():
    with pytest.raises(ConfigError, match="pipeline_parallel_size 4 is more than the model's 3 layers"):
        split_layers(3, 4)


@pytest.mark.parametrize(
    ("stored", "asked", "device", "expected"),
    [
        ("float32", "auto", "cpu", torch.float32),
        ("float32", "auto", "cuda", torch.bfloat16),
        ("float16", "auto", "cuda", torch.float16),
        ("float32", "float32", "cuda", torch.float32),
        (None, "auto", "cuda", torch.bfloat16),
    ],
)
def test_float32_checkpoints_run_in_bfloat16_on_gpus_unless_asked_otherwise(stored, asked, device, expected):
    config = LlamaConfig(dtype=stored)
    assert resolve_dtype(config, asked, device=torch.device(device)) is expected
