"""Every row attends to every row of its own request, and to no other: numbers, not flags.

The live engine's attention layers and hidden states against dense float64 references, per attention backend that runs
on this host; a backend that quietly ignored ``causal=False`` would fail here, not only write nonsense.
"""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from tests.golden import cases

TEXT, CACHED, IMAGE = "a1_text_single_block", "g10_fast_text_r8_thr1", "c1_steps_lt_gen"
HEAD_SIZE, NUM_HEADS, MASK_ID = 16, 4, 126336


@dataclass
class Step:
    """One forward pass. calls: per layer [q, k, v, out], each [N, heads * head size]; hidden: [N, hidden].

    read: rows whose final hidden state is read; the last layer's out has only those. None: all.
    """

    req_ids: list[str]
    first_row: list[int]
    num_computed: list[int]
    calls: list[list[torch.Tensor]] = field(default_factory=list)
    hidden: torch.Tensor | None = None
    read: torch.Tensor | None = None

    def rows(self, request):
        return slice(self.first_row[request], self.first_row[request + 1])


@pytest.fixture
def recorded_steps(engine, monkeypatch):
    """Forward passes of the live engine, as they happen."""
    steps, prepare = [], engine.model_state.prepare_attn

    def prepare_attn(input_batch, *args, **kwargs):
        starts = input_batch.query_start_loc_np[: input_batch.num_reqs + 1].tolist()
        computed = input_batch.num_computed_tokens_np[: input_batch.num_reqs].tolist()
        steps.append(Step(list(input_batch.req_ids), starts, computed))
        return prepare(input_batch, *args, **kwargs)

    monkeypatch.setattr(engine.model_state, "prepare_attn", prepare_attn)

    def copies(*tensors):
        # At once: kernels work in place.
        return [x.double().clone() for x in tensors]

    def recording(project):
        def recorded(*inputs):
            out = project(*inputs)
            steps[-1].calls.append(copies(*out))
            return out

        return recorded

    def before_output(module, inputs):
        steps[-1].calls[-1] += copies(*inputs)

    def on_model(module, inputs, out):
        steps[-1].hidden = out.double().clone()
        read = engine.model_state.forward_plan.final_rows
        steps[-1].read = None if read is None else read.clone()

    attentions = [layer.self_attn for layer in engine.model.model.layers]
    handles = [engine.model.model.register_forward_hook(on_model)]
    for attention in attentions:
        # Long steps are projected in parts, so hooks of the modules inside would see those.
        monkeypatch.setattr(attention, "_project", recording(attention._project))
        handles.append(attention.o_proj.register_forward_pre_hook(before_output))
    yield steps
    for handle in handles:
        handle.remove()


def request(name):
    from tests.engine.engines import case_params, case_prompt

    return case_prompt(cases.load(name)), case_params(cases.load(name))


def dense_attention(q, k, v, causal):
    """[N, heads * size] float64 of q [N, ...] that ends where k and v [T, ...] end."""
    q, k, v = (x.unflatten(1, (NUM_HEADS, -1)).transpose(0, 1) for x in (q, k, v))
    scores = q @ k.transpose(1, 2) * HEAD_SIZE**-0.5
    if causal:
        above = torch.ones(scores.shape[1:], dtype=torch.bool).triu(k.shape[1] - q.shape[1] + 1)
        scores = scores.masked_fill(above, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def own_rows(step, request):
    """The rows of a request that are read, [rows] int64 in the batch."""
    rows = step.rows(request)
    return step.read[(step.read >= rows.start) & (step.read < rows.stop)]


def assert_bidirectional(steps):
    """Every call of every layer; cached keys are those of the request's last whole forward. Returns cached steps."""
    cache, num_cached = {}, 0
    for step in steps:
        assert len(step.calls) == 4
        for r, req_id in enumerate(step.req_ids):
            rows, start = step.rows(r), step.num_computed[r]
            num_cached += start > 0
            for layer, call in enumerate(step.calls):
                q, k, v = (x[rows] for x in call[:3])
                is_cut = layer == 3 and step.read is not None
                read = own_rows(step, r) if is_cut else torch.arange(rows.start, rows.stop)
                out = call[3][torch.isin(step.read, read)] if is_cut else call[3][rows]
                if start:
                    old_k, old_v = cache[req_id, layer]
                    k, v = torch.cat([old_k[:start], k]), torch.cat([old_v[:start], v])
                cache[req_id, layer] = (k, v)
                expected = dense_attention(q, k, v, causal=False)[read - rows.start]
                assert out.shape == expected.shape
                assert (out - expected).abs().max() < 1e-4
                if not is_cut:  # the canvas alone may be its last row, which sees everything either way
                    assert (out - dense_attention(q, k, v, causal=True)).abs().max() > 1e-2
    return num_cached


def test_backends_of_this_host(engine):
    """What the other tests run on. Another backend belongs into this list once it has passed them."""
    backends = {group.backend.get_name() for groups in engine.runner.attn_groups for group in groups}
    assert backends <= {"CPU_ATTN"}
    # Heads of 16 channels run in kernels of 32, so the numbers below prove the padding, too.
    assert {layer.self_attn.padded_dim for layer in engine.model.model.layers} == {32}
    assert {layer.self_attn.head_dim for layer in engine.model.model.layers} == {HEAD_SIZE}


def compute_all_rows(engine, monkeypatch):
    """Let the last layer compute rows that nobody reads, too."""
    setter = property(lambda self: None, lambda self, rows: None)
    monkeypatch.setattr(type(engine.model_state.forward_plan), "final_rows", setter, raising=False)


@pytest.mark.parametrize("all_rows", [False, True])
@pytest.mark.parametrize("always_the_backend", [False, True])
def test_attention_layers(engine, recorded_steps, monkeypatch, always_the_backend, all_rows):
    """Steps of whole sequences take a shorter way on CPUs; with it, and with all steps in the backend's kernel."""
    if always_the_backend:
        for layer in engine.model.model.layers:
            monkeypatch.setattr(layer.self_attn, "attend_whole", None)
    if all_rows:
        compute_all_rows(engine, monkeypatch)
    engine.use({"seed": 0})
    engine.run({name: request(name) for name in (TEXT, CACHED, IMAGE)})
    assert all((step.read is None) == all_rows for step in recorded_steps)
    assert len(recorded_steps[0].req_ids) == 3
    assert assert_bidirectional(recorded_steps) >= 16


def test_prompts_that_attend_to_themselves_only(engine, recorded_steps, monkeypatch):
    """More rows of attention than requests: prompt rows see the prompt, canvas rows see all."""
    from vllm_dvlm.worker.attention_rows import AttentionRows

    state = engine.model_state
    prompts = {name: len(cases.load(name).prompt_ids) for name in (TEXT, CACHED)}

    def attention_rows(builder):
        whole, splits = builder.scheduled, []
        for r, req_id in enumerate(builder.input_batch.req_ids):
            (prompt,) = [n for name, n in prompts.items() if req_id.startswith(name)]
            first, end = whole.query_start[r : r + 2].tolist()
            assert end - first == whole.kv_len[r]
            splits += [(r, first, prompt), (r, first + prompt, end - first)]
        request, starts, kv_len = zip(*splits, strict=True)
        starts = np.array([*starts, whole.query_start[-1]], dtype=np.int32)
        return AttentionRows(np.array(request), starts, np.array(kv_len, dtype=np.int32))

    monkeypatch.setattr(state, "attention_rows", attention_rows)
    engine.use({"seed": 0})
    exact = {"diffusion_refresh_interval": 1, "diffusion_max_steps": 4, "diffusion_canvas_length": 16}
    work = {}
    for name in prompts:
        prompt, params = request(name)
        params.extra_args = params.extra_args | exact | {"diffusion_block_length": 16}
        work[name] = prompt, params
    engine.run(work)
    step = recorded_steps[0]
    assert len(step.req_ids) == 2
    for r, req_id in enumerate(step.req_ids):
        (prompt,) = [n for name, n in prompts.items() if req_id.startswith(name)]
        q, k, v, out = (x[step.rows(r)] for x in step.calls[0])
        alone = dense_attention(q[:prompt], k[:prompt], v[:prompt], causal=False)
        assert (out[:prompt] - alone).abs().max() < 1e-4
        assert (out[prompt:] - dense_attention(q, k, v, causal=False)[prompt:]).abs().max() < 1e-4
        assert (out[:prompt] - dense_attention(q, k, v, causal=False)[:prompt]).abs().max() > 1e-2


@pytest.mark.parametrize("all_rows", [False, True])
def test_hidden_states_of_a_request(engine, recorded_steps, checkpoint, monkeypatch, all_rows):
    """The whole model: all rows, prompt included, in whole and in cached steps, among another request's rows.

    And as it runs: rows that are read have the same numbers, all others are zero.
    """
    from vllm_dvlm.reference.model import KVCache, ReferenceModel, _rms_norm

    if all_rows:
        compute_all_rows(engine, monkeypatch)
    engine.use({"seed": 0})
    case = cases.load(CACHED)
    engine.run({TEXT: request(TEXT), CACHED: request(CACHED)})
    model = ReferenceModel.load(checkpoint(seed=0), torch.float64)
    canvas = [MASK_ID] * case.settings["gen_length"]
    own = [(step, r) for step in recorded_steps for r, i in enumerate(step.req_ids) if i.startswith(CACHED)]
    assert len(own) == len(case.steps)
    kinds = set()
    for (step, r), recorded in zip(own, case.steps, strict=True):
        start = step.num_computed[r]
        kinds.add(start)
        with torch.inference_mode():
            if start == 0:
                cache = KVCache()
            hidden = model.text.forward(model.embed(case.prompt_ids + canvas)[None, start:], start, cache)[0]
            hidden = _rms_norm(hidden, model.text.norm, model.text.eps)
        ours = step.hidden[step.rows(r)]
        assert ours.shape == hidden.shape
        if not all_rows:
            read = own_rows(step, r) - step.first_row[r]
            skipped = torch.ones(len(ours), dtype=torch.bool)
            skipped[read] = False
            assert len(read) and not ours[skipped].any()
            ours, hidden = ours[read], hidden[read]
        assert (ours - hidden).abs().max() < 1e-3 * hidden.abs().max()
        for position, token in zip(recorded["pos"], recorded["ids"], strict=True):
            canvas[position] = token
    assert kinds == {0, *(case.prompt_len + block for block in (0, 8, 16, 24))}


@pytest.mark.parametrize(
    "options, more",
    [
        ({}, 0),
        ({"diffusion_refresh_interval": 8}, 0),
        ({"prune_method": "redvtp", "prune_keep_ratio": 0.5}, 0),
        ({"prune_method": "fastv", "prune_keep_ratio": 0.5}, 1),  # behind its layer the first step has shorter rows
    ],
    ids=["exact", "cached", "redvtp", "fastv"],
)
def test_metadata_is_built_once_a_step(engine, monkeypatch, options, more):
    """Not once a layer."""
    from vllm.v1.worker.gpu import attn_utils

    build, prepare = attn_utils.build_attn_metadata, engine.model_state.prepare_attn
    built, steps = [], []
    monkeypatch.setattr(attn_utils, "build_attn_metadata", lambda *a, **k: (built.append(1), build(*a, **k))[1])
    monkeypatch.setattr(engine.model_state, "prepare_attn", lambda *a, **k: (steps.append(1), prepare(*a, **k))[1])
    prompt, params = request(IMAGE)
    params.extra_args = params.extra_args | options
    engine.use({"seed": 0})
    engine.run({"one": (prompt, params)})
    assert len(steps) >= 4 and len(built) == len(steps) + more
