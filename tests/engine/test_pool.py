"""KV blocks of dropped visual tokens: back in the pool in the same step, used by the next one, and never lost."""

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from tests.golden import cases

# The case's 945 tokens take 30 KV blocks of 32 tokens, 10 once a quarter of its visual tokens is kept. Usable are 44
# blocks: one whole request beside one that is pruned, but not two whole ones.
CASE = cases.load("f1_redvtp_keep25")
WHOLE, PRUNED, NUM_USABLE = 30, 10, 44


@pytest.fixture(scope="module")
def small_pool(checkpoint, tmp_path_factory):
    """An engine whose KV pool holds one and a half requests."""
    from tests.engine import engines

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "NUM_KV_BLOCKS", NUM_USABLE + 1)  # one is vLLM's null block
        patch.setattr(engines, "MAX_MODEL_LEN", 1024)
        made = engines.Engine(checkpoint, tmp_path_factory.mktemp("traces"))
    yield made
    made.close()


def add(engine, name, **options):
    from tests.engine.engines import case_params, case_prompt

    engine.add(name, case_prompt(CASE), case_params(CASE, extra_args=options))


def lives(engine, names):
    """Steps each request lived, as (first, last) engine step, from 1; the blocks held after each step."""
    seen, held = {name: [] for name in names}, []
    step = 0
    while engine.engine.has_unfinished_requests():
        step += 1
        before = {request.request_id for request in engine.scheduler.running}
        done = [output.request_id for output in engine.engine.step() if output.finished]
        after = {request.request_id for request in engine.scheduler.running}
        for name in names:
            if name in done or any(request_id.startswith(f"{name}-") for request_id in before | after):
                seen[name].append(step)
        held.append(engine.num_held_blocks)
        assert engine.num_free_blocks + held[-1] == engine.num_idle_blocks
    engine.finish()
    engine.assert_idle()
    return {name: (steps[0], steps[-1]) for name, steps in seen.items()}, held


@pytest.mark.parametrize("method", ["redvtp", "fastv", "uniform"])
def test_second_request_starts_in_the_next_step(small_pool, method):
    assert small_pool.num_idle_blocks == NUM_USABLE < 2 * WHOLE
    for name in ("a", "b"):
        add(small_pool, name, prune_method=method, prune_keep_ratio=0.25)
    life, held = lives(small_pool, ["a", "b"])
    assert life["a"] == (1, 8) and life["b"] == (2, 9)
    assert held == [PRUNED] + [2 * PRUNED] * 6 + [PRUNED, 0]


def test_without_pruning_it_waits_for_the_first_to_end(small_pool):
    for name in ("a", "b"):
        add(small_pool, name, prune_method="none")
    life, held = lives(small_pool, ["a", "b"])
    assert life["a"] == (1, 8) and life["b"] == (9, 16)
    assert max(held) == WHOLE


def test_more_requests_in_flight(small_pool):
    """Four at once where only one fits unpruned: each is admitted when the one before it has shrunk."""
    names = [f"r{i}" for i in range(4)]
    most = {}
    for method in ("none", "redvtp"):
        for name in names:
            add(small_pool, name, prune_method=method, prune_keep_ratio=0.05)
        life, _ = lives(small_pool, names)
        most[method] = max(sum(first <= step <= last for first, last in life.values()) for step in range(1, 100))
        if method == "redvtp":
            assert [first for first, _ in life.values()] == [1, 2, 3, 4]
    assert most == {"none": 1, "redvtp": 4}


def test_tokens_do_not_depend_on_the_pool(small_pool):
    """Requests that moved into blocks which others gave back decode as recorded."""
    from tests.engine.engines import case_params, case_prompt, case_tokens, tokens

    for interval in (1, 32):
        params = case_params(CASE, extra_args={"diffusion_refresh_interval": interval})
        outputs = small_pool.run({f"r{i}": (case_prompt(CASE), params) for i in range(4)})
        found = [tokens(output) for output in outputs.values()]
        assert all(one == found[0] for one in found)
        if interval == 1:
            assert found[0] == case_tokens(CASE)


# -- 10,000 random operations on vLLM's scheduler and KV cache manager, without a model --------------------------

BLOCK_SIZE, NUM_BLOCKS, MAX_SEQS, MAX_LEN, MAX_TOKENS = 16, 90, 8, 600, 900
END_OF_TURN = 126348
# Steps. Forty requests in a queue, first come, first served, eight at a time, at most some sixty steps each.
MAX_WAIT = 400


@dataclass
class Twin:
    """What a worker knows of one request: lengths, where it stands, its row of the block table."""

    plan: object
    pruned_plan: object
    position: object
    late_removed: int = 0  # tokens that late layers never see, in the first step
    block_ids: list[list[int]] = field(default_factory=list)  # per KV cache group
    images: list[str] = field(default_factory=list)  # their names in the encoder cache
    is_lost: bool = False

    def lengths(self, num_groups):
        """Rows that the next step needs in each group."""
        return [self.plan.total_len, self.plan.total_len - self.late_removed][:num_groups]


class Driver:
    """DiffusionScheduler in a process of its own kind: the test plays the front end and the worker.

    The worker's side is computed anew from the options with ``steps``, never read from the scheduler's requests.
    """

    def __init__(self, folder, seed, two_groups):
        import torch
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        from vllm_dvlm.kv.groups import layer_spec
        from vllm_dvlm.scheduler import DiffusionScheduler
        from vllm_dvlm.settings import ServerSettings

        config = EngineArgs(
            str(folder),
            max_model_len=MAX_LEN,
            max_num_batched_tokens=MAX_TOKENS,
            max_num_seqs=MAX_SEQS,
            block_size=BLOCK_SIZE,
            additional_config={"dvlm": {"max_canvas_length": 32} | ({"prune_method": "fastv"} if two_groups else {})},
        ).create_engine_config()
        assert config.scheduler_config.get_scheduler_cls() is DiffusionScheduler
        assert not config.scheduler_config.enable_chunked_prefill and not config.scheduler_config.async_scheduling
        num_blocks = NUM_BLOCKS * (2 if two_groups else 1)  # half the layers, half the bytes
        config.cache_config.num_gpu_blocks = num_blocks
        spec = FullAttentionSpec(BLOCK_SIZE, num_kv_heads=4, head_size=32, dtype=torch.float32, non_causal=True)
        # The tiny model's four layers: two before fastv's default layer, two behind it.
        kinds = [layer_spec(spec, is_late) for is_late in (False, True)] if two_groups else [spec]
        groups = [KVCacheGroupSpec([f"layers of group {i}"], kind) for i, kind in enumerate(kinds)]
        kv_config = KVCacheConfig(num_blocks, [], groups)
        manager = StructuredOutputManager(config)
        self.scheduler = DiffusionScheduler(config, kv_config, manager, BLOCK_SIZE)
        self.settings = ServerSettings.from_additional_config(config.additional_config)
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.owners = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        assert len(self.owners) == len(kinds) and (self.settings.late_group_start() == 2) == two_groups
        self.rng = random.Random(seed)
        self.twins: dict[str, Twin] = {}
        self.arrived: dict[str, int] = {}
        self.waited: dict[str, int] = {}
        self.outcomes = Counter()
        self.encoded: set[str] = set()
        self.num_steps = self.num_admitted = self.most_running = self.num_empty_steps = self.longest_wait = 0
        self.total = self.pool.get_num_free_blocks()
        assert self.total == num_blocks - 1

    # -- operations --------------------------------------------------------------------------------------------

    def admit(self):
        from vllm import SamplingParams
        from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
        from vllm.v1.request import Request

        rng, name = self.rng, f"r{self.num_admitted}"
        self.num_admitted += 1
        canvas = rng.choice([8, 16, 24, 32])
        block = rng.choice([b for b in (2, 4, 8, canvas) if canvas % b == 0])
        options = {
            "diffusion_canvas_length": canvas,
            "diffusion_block_length": block,
            "diffusion_max_steps": canvas // block * rng.randint(1, block),
            "diffusion_refresh_interval": rng.choice([1, 2, 32]),
            "prune_method": rng.choice(["none", "redvtp", "redvtp", "fastv", "random"]),
            "prune_keep_ratio": rng.choice([1.0, rng.uniform(0.001, 1)]),
            "prune_positions": rng.choice(["renumber", "keep"]),
        }
        if rng.random() < 0.3:
            options["diffusion_threshold"] = 1.0
        lengths = [rng.randint(1, 250) for _ in range(rng.choice([0, 1, 1, 1, 2]))]
        features, end = [], rng.randint(1, 40)
        for i, length in enumerate(lengths):
            place = PlaceholderRange(offset=end, length=length)
            identifier = rng.choice([f"{name}-{i}", f"shared-{length}"])
            features.append(MultiModalFeatureSpec(None, "image", identifier, place))
            end += length + rng.randint(0, 5)
        # Now and then too long for the model: the scheduler must fail that request alone.
        prompt_len = end + (MAX_LEN if rng.random() < 0.03 else rng.randint(1, 20))
        max_tokens = rng.choice([canvas, rng.randint(1, canvas)])
        params = SamplingParams(temperature=0, max_tokens=max_tokens, extra_args=options)
        request = Request(name, [7] * prompt_len, params, None, mm_features=features)
        self.scheduler.add_request(request)
        self.arrived[name], self.waited[name] = self.num_steps, 0

    def step(self):
        from vllm_dvlm.options import RESUME_KEY
        from vllm_dvlm.steps import Resume, step_at

        output = self.scheduler.schedule()
        self.num_steps += 1
        # One step may be empty: that in which the only request was one to be refused.
        is_empty = self.arrived and not output.num_scheduled_tokens
        self.num_empty_steps = self.num_empty_steps + 1 if is_empty else 0
        for new in output.scheduled_new_reqs:
            # Also a preempted request that comes back: the runner sees it as new and the state finds its stash, or not.
            twin = self.twins.get(new.req_id)
            resume = (new.sampling_params.extra_args or {}).get(RESUME_KEY)
            if twin is None or Resume.from_list(resume).restarts:
                twin = self._new_twin(new)
            elif self.rng.random() < 0.2:
                twin.is_lost = True
            twin.block_ids = [list(blocks) for blocks in new.block_ids]
            twin.images = [feature.identifier for feature in new.mm_features]
            self.twins[new.req_id] = twin
        self.encoded -= set(output.free_encoder_mm_hashes)
        for name, indices in output.scheduled_encoder_inputs.items():
            self.encoded |= {self.twins[name].images[i] for i in indices}
        for new in output.scheduled_new_reqs:
            assert self.encoded >= set(self.twins[new.req_id].images), "a prompt without one of its images"
        cached = output.scheduled_cached_reqs
        for _, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            assert blocks is None or not any(blocks), "a running request never needs more blocks"
        assert sum(output.num_scheduled_tokens.values()) <= MAX_TOKENS
        new_names = {new.req_id for new in output.scheduled_new_reqs}
        for name, num_tokens in output.num_scheduled_tokens.items():
            twin = self.twins[name]
            step = step_at(twin.plan, twin.position)
            start = 0 if name in new_names else step.query_start
            assert start + num_tokens == step.query_end, "half a denoising step"
            for owner, row, length in self._groups(name):
                assert len(row) * BLOCK_SIZE >= length, "rows without a KV block"
                assert row == [block.block_id for block in owner.req_to_blocks[name]]
            self.waited[name] = 0
        for name in self.waited:
            if name not in output.num_scheduled_tokens:
                self.waited[name] += 1
        self.most_running = max(self.most_running, len(output.num_scheduled_tokens))
        if self.rng.random() < 0.05:
            self.abort()  # while the model runs
        self._deliver(output)
        self.check()
        return output

    def _new_twin(self, new):
        from vllm_dvlm.options import RESUME_KEY
        from vllm_dvlm.placement import resolve
        from vllm_dvlm.steps import Position, Resume

        params = resolve(new.sampling_params.extra_args, new.sampling_params.max_tokens, self.settings)
        plan = params.plan(len(new.prompt_token_ids))
        num_visual = sum(feature.mm_position.length for feature in new.mm_features)
        pruned = params.pruned_plan(plan, num_visual)
        is_late = pruned is not None and params.prune_after_layers(4) == self.settings.late_group_start()
        resume = new.sampling_params.extra_args.get(RESUME_KEY)
        position = Position() if resume is None else Resume.from_list(resume).position
        assert len(new.prefill_token_ids) == len(new.prompt_token_ids) + position.num_emitted
        assert position.step_in_block == 0 and position.block_start <= position.num_emitted
        return Twin(plan, pruned, position, plan.total_len - pruned.total_len if is_late else 0)

    def _groups(self, name):
        """(owner of the blocks, the worker's row of the block table, tokens) for each KV cache group."""
        twin = self.twins[name]
        return zip(self.owners, twin.block_ids, twin.lengths(len(self.owners)), strict=True)

    def _deliver(self, output):
        """The worker's side of a step, then the scheduler's."""
        from vllm.v1.outputs import ModelRunnerOutput

        from vllm_dvlm.steps import LOST, advance, cdiv

        names, sampled, reports = list(output.num_scheduled_tokens), [], {}
        for name in names:
            twin = self.twins.get(name)
            if twin is None:  # aborted while the model ran
                sampled.append([7])
                continue
            if twin.is_lost:  # it says so, and computes nothing
                sampled.append([])
                reports[name], twin.is_lost = LOST, False
                self.outcomes["lost"] += 1
                continue
            if twin.pruned_plan is not None:
                twin.plan, twin.pruned_plan, twin.late_removed = twin.pruned_plan, None, 0
                for row in twin.block_ids:
                    del row[cdiv(twin.plan.total_len, BLOCK_SIZE) :]
            plan, at = twin.plan, twin.position
            rest = plan.canvas_len - at.num_emitted
            num_new = min(rest, self.rng.choice([0, 0, 0, 0, 1, 1, 2, 5]))
            is_last = at.block_start + plan.block_len >= plan.canvas_len
            overdue = at.step_in_block + 1 >= (plan.steps_per_block or plan.block_len)
            if overdue:  # the block's schedule is used up, so nothing in it is masked
                num_new = rest if is_last else max(num_new, at.block_start + plan.block_len - at.num_emitted)
            tokens = [7] * num_new
            if num_new and self.rng.random() < 0.03:
                tokens[-1] = END_OF_TURN
            sampled.append(tokens)
            twin.position = advance(plan, at, num_new)
        runner_output = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, sampled)
        runner_output.num_nans_in_logits = reports
        for outputs in self.scheduler.update_from_output(output, runner_output).values():
            for one in outputs.outputs:
                if one.finish_reason is not None:
                    self._gone(one.request_id, str(one.finish_reason))

    def _gone(self, name, outcome):
        self.outcomes[outcome] += 1
        self.twins.pop(name, None)
        del self.arrived[name], self.waited[name]

    def abort(self):
        from vllm.v1.request import RequestStatus

        if self.arrived:
            name = self.rng.choice(list(self.arrived))
            self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
            self._gone(name, "abort")

    def preempt(self):
        self.outcomes["preempted"] += len(self.scheduler.running)
        self.scheduler.reset_prefix_cache(reset_running_requests=True)

    # -- invariants --------------------------------------------------------------------------------------------

    def check(self):
        scheduler = self.scheduler
        owned = [block for owner in self.owners for blocks in owner.req_to_blocks.values() for block in blocks]
        ids = [block.block_id for block in owned]
        assert len(ids) == len(set(ids)), "a block in two requests"
        assert all(block.ref_cnt == 1 and not block.is_null for block in owned)
        # The null block is the one that is in neither count.
        assert self.pool.get_num_free_blocks() + len(ids) == self.total, "KV blocks lost or freed twice"
        assert all(set(owner.req_to_blocks) <= set(scheduler.requests) for owner in self.owners)
        assert set(scheduler.requests) == set(self.arrived)
        assert self.num_empty_steps < 2, "deadlock: the pool alone holds any single request"
        self.longest_wait = max(self.longest_wait, *self.waited.values(), 0, 0)
        assert self.longest_wait < MAX_WAIT, "a request starves"
        for request in scheduler.running:
            twin = self.twins[request.request_id]
            for owner, _, length in self._groups(request.request_id):
                held = len(owner.req_to_blocks[request.request_id])
                assert held == -(-length // BLOCK_SIZE), "tail kept, or more than the tail given back"
            assert (request.plan, request.pruned_plan) == (twin.plan, twin.pruned_plan)


@pytest.mark.parametrize("two_groups", [False, True], ids=["one KV group", "late layers apart"])
def test_pool_is_conserved(checkpoint, two_groups):
    """Admit, step, prune at any ratio, finish, abort, preempt, forget, fail; 10,000 operations."""
    driver = Driver(checkpoint(seed=0), seed=int(two_groups), two_groups=two_groups)
    for _ in range(10_000):
        draw = driver.rng.random()
        if draw < 0.25 and len(driver.arrived) < 40:
            driver.admit()
        elif draw < 0.28:
            driver.abort()
        elif draw < 0.29:
            driver.preempt()
        else:
            driver.step()
        driver.check()
    num_finished = sum(driver.outcomes[kind] for kind in ("length", "stop", "abort", "error"))
    for _ in range(2000):  # nobody new; everything ends
        if not driver.arrived:
            break
        driver.step()
    assert not driver.arrived and not driver.scheduler.requests
    assert driver.pool.get_num_free_blocks() == driver.total
    assert not any(owner.req_to_blocks for owner in driver.owners)
    assert not any(getattr(owner, "removed", None) for owner in driver.owners)
    assert driver.scheduler.counters["kv_blocks_freed"] > 1000
    assert driver.most_running == MAX_SEQS and num_finished > 500
    assert {"length", "stop", "abort", "error", "preempted"} <= set(driver.outcomes), driver.outcomes
    assert driver.outcomes["lost"] > 20
