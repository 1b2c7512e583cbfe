"""Distillation: losses against NumPy, gradients, blocks, sharding, exact resume, and the checkpoint that comes out."""

import csv
import functools
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import small_models as small
from conftest import GOLDEN

import ic_jax
from convert import export, safetensors
from ic_jax import checkpoint, distill, distill_files, distill_loss, model, pattern_file, sharding
from ic_jax.config import Config
from ic_jax.errors import UserError
from ic_jax.pattern import Pattern

S = 19
DENSE = Config.from_hf(small.MIXED | dict(num_hidden_layers=3, mlp_layer_types=["dense"] * 3, index_topk=5))
EXPERTS = Config.from_hf(small.MIXED | dict(num_hidden_layers=4, mlp_layer_types=["sparse"] * 4, index_topk=5))
FSS, FSFS = Pattern("FSS"), Pattern("FSFS")


def weights(c, pattern, seed=3):
    """Random float32 weights, large enough that attention is not flat."""
    rng = np.random.default_rng(seed)
    shapes = model.abstract_params(c, pattern.n_full, jnp.float32)[0]
    make = lambda path, a: float("norm" in path[-1].key) + (0.12 if a.ndim > 2 else 0.02) * rng.standard_normal(a.shape)
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), jax.tree.map_with_path(make, shapes))


def ids(c, B=2, S=S, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, c.vocab_size, (B, S)), jnp.int32)


# Little is computed here and much compiled.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


# The losses against NumPy. -------------------------------------------------------------------------------------------
def norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rotate(c, x):
    """Interleaved rope of x [S, …, R]."""
    angles = np.arange(len(x))[:, None] * c.rope.theta ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    angles = angles.reshape(len(x), *(1,) * (x.ndim - 2), -1)
    a, b = x[..., 0::2], x[..., 1::2]
    return np.stack([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1).reshape(x.shape)


def by_hand(c, params, pattern, ids_S, sparse):
    """(attention averaged over heads of every layer, scores and visible positions of its F layer), float64 [L,S,S]."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x, N, R, C, slot = params["embed_tokens"][ids_S], c.qk_nope_head_dim, c.qk_rope_head_dim, c.kv_lora_rank, -1
    out = []
    for layer, letter in enumerate(pattern.layers):
        p, f = ({k: v[layer] for k, v in params[g].items()} for g in ("layers", "dense"))
        h = norm(x, p["input_layernorm"], c.rms_norm_eps)
        qa = norm(h @ p["q_a_proj"].T, p["q_a_layernorm"], 1e-6)
        visible = np.tril(np.ones((len(x), len(x)), bool))
        if letter == "F":
            slot += 1
            i = {k: v[slot] for k, v in params["indexer"].items()}
            q = (qa @ i["wq_b"].T).reshape(len(x), c.index_n_heads, -1)
            q = np.concatenate([rotate(c, q[..., :R]), q[..., R:]], -1)
            k = h @ i["wk"].T
            k = (k - k.mean(-1, keepdims=True)) / np.sqrt(k.var(-1, keepdims=True) + 1e-6)
            k = k * i["k_norm_weight"] + i["k_norm_bias"]
            k = np.concatenate([rotate(c, k[..., :R]), k[..., R:]], -1)
            w = h @ i["weights_proj"].T * (c.index_n_heads * c.index_head_dim) ** -0.5
            scores = np.stack([oracle.index_scores(q[t], w[t], k) for t in range(len(x))])
            chosen = visible.copy()
            for t in range(len(x)):
                chosen[t, : t + 1] = np.isin(np.arange(t + 1), oracle.select(scores[t, : t + 1], c.index_topk))
        mask = chosen if sparse else visible
        q = (qa @ p["q_b_proj"].T).reshape(len(x), c.num_attention_heads, -1)
        kv = h @ p["kv_a_proj_with_mqa"].T
        latent = norm(kv[:, :C], p["kv_a_layernorm"], 1e-6)
        logits = np.einsum("shn,hnc,tc->hst", q[..., :N], p["k_b_proj"], latent)
        logits += np.einsum("shr,tr->hst", rotate(c, q[..., N:]), rotate(c, kv[:, C:]))
        attention = softmax(np.where(mask, logits * c.softmax_scale, -np.inf))
        out.append((attention.mean(0), scores, mask))
        o = np.einsum("hst,tc,hvc->shv", attention, latent, p["v_b_proj"]).reshape(len(x), -1)
        x = x + o @ p["o_proj"].T
        h = norm(x, p["post_attention_layernorm"], c.rms_norm_eps)
        gate = h @ f["gate_proj"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ f["up_proj"].T)) @ f["down_proj"].T
    return [np.stack(part) for part in zip(*out, strict=True)]


def entropy(p):
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)


def divergence(p, scores, mask):
    """Mean over queries of KL(p || softmax(scores)) over the mask."""
    log_q = np.log(softmax(np.where(mask, scores, -np.inf)), where=mask, out=np.zeros(mask.shape))
    return (-entropy(p) - (p * log_q).sum(-1)).mean()


@functools.cache
def index_losses(c, pattern, sparse, loss):
    """(params, index losses [G], gradients of their sum) of one batch."""
    params = weights(c, pattern)

    def total(params):
        losses = distill_loss.forward(params, c, pattern, ids(c), sparse=sparse, loss=loss, block=8)[1]
        return losses.sum(), losses

    grads, losses = quick(jax.grad(total, has_aux=True))(params)
    return params, losses, grads


@pytest.mark.parametrize("sparse", [False, True])
def test_losses_and_their_gap_are_those_computed_by_hand(sparse):
    params, multi, _ = index_losses(DENSE, FSS, sparse, "multi")
    found = [by_hand(DENSE, params, FSS, row, sparse) for row in np.asarray(ids(DENSE))]
    mean = lambda function: np.mean([function(p, scores, mask) for p, scores, mask in found])
    by_layer = mean(lambda p, scores, mask: np.mean([divergence(p[j], scores[0], mask[0]) for j in range(3)]))
    averaged = mean(lambda p, scores, mask: divergence(p.mean(0), scores[0], mask[0]))
    gap = mean(lambda p, scores, mask: (entropy(p.mean(0)) - entropy(p).mean(0)).mean())
    assert gap > 0.005 and np.isclose(by_layer - averaged, gap, rtol=1e-9)
    _, average, _ = index_losses(DENSE, FSS, sparse, "avg")
    np.testing.assert_allclose([multi[0], average[0]], [by_layer, averaged], rtol=2e-4)
    np.testing.assert_allclose(multi[0] - average[0], gap, rtol=2e-3)
    if not sparse:
        _, own, _ = index_losses(DENSE, FSS, sparse, "own")
        np.testing.assert_allclose(own[0], mean(lambda p, s, m: divergence(p[0], s[0], m[0])), rtol=2e-4)


@pytest.mark.parametrize("sparse", [False, True])
def test_multi_and_average_have_one_gradient(sparse):
    (_, _, multi), (_, _, average) = (index_losses(DENSE, FSS, sparse, loss) for loss in ("multi", "avg"))
    largest = max(jnp.abs(g).max() for g in jax.tree.leaves(multi["indexer"]))
    for name, grad in multi["indexer"].items():
        np.testing.assert_allclose(grad, average["indexer"][name], rtol=1e-3, atol=1e-5 * largest)


def test_own_loss_is_another():
    """One F layer serving three: the own-layer gradient is not the gradient of all three."""
    multi, own = (index_losses(DENSE, FSS, False, loss)[2]["indexer"]["wk"] for loss in ("multi", "own"))
    assert jnp.linalg.norm(own - multi) > 0.05 * jnp.linalg.norm(own)


# The forward. --------------------------------------------------------------------------------------------------------
def objective(block, remat):
    """Weights of the two losses, as data, and parameters -> their sum."""

    def total(parts, params):
        x, index = distill_loss.forward(params, EXPERTS, FSFS, ids(EXPERTS), sparse=True, block=block, remat=remat)
        return parts[0] * index.sum() + parts[1] * distill_loss.lm_loss(params, EXPERTS, x, ids(EXPERTS, seed=1))

    return jax.value_and_grad(total, 1)


@functools.cache
def gradients(*options):
    return quick(objective(*options))


def test_blocks_and_remat_change_nothing():
    value, grads = gradients(S, False)((1.0, 1.0), weights(EXPERTS, FSFS))
    other, other_grads = gradients(8, True)((1.0, 1.0), weights(EXPERTS, FSFS))
    np.testing.assert_allclose(value, other, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), grads, other_grads)


def test_each_loss_trains_its_own_part():
    largest = lambda tree: max(float(jnp.abs(g).max()) for g in jax.tree.leaves(tree))
    for parts in ((1.0, 0.0), (0.0, 1.0)):
        backbone = dict(gradients(8, True)(parts, weights(EXPERTS, FSFS))[1])
        indexers = backbone.pop("indexer")
        assert (largest(indexers) > 0, largest(backbone) > 0) == (parts[0] > 0, parts[1] > 0)
        if parts[0]:
            assert all(jnp.abs(g[slot]).max() > 0 for g in jax.tree.leaves(indexers) for slot in range(2))


def shapes_of(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (tuple(v.aval.shape) for v in eqn.outvars)
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from shapes_of(inner)


def test_no_square_of_the_context_exists():
    """Forward and backward: with blocks no array has two axes of the context, whatever its other axes."""
    big = lambda shape: sum(n in (S, 27) for n in shape) >= 2  # 27: S filled up to blocks
    program = lambda block: jax.make_jaxpr(objective(block, True))((1.0, 1.0), weights(EXPERTS, FSFS)).jaxpr
    assert any(map(big, shapes_of(program(S))))
    assert not any(map(big, shapes_of(program(9))))


def test_forward_is_the_model():
    """Sparse and dense logits equal ``model.forward``'s."""
    from ic_jax import cache

    params, tokens = weights(EXPERTS, FSFS), ids(EXPERTS)
    positions = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), tokens.shape)
    for dense in (False, True):
        kv = cache.allocate(EXPERTS, 2, 2, S, dtype=jnp.float32)
        run = functools.partial(model.forward, c=EXPERTS, slots=(0, -1, 1, -1), all_logits=True, dense=dense)
        expected = quick(run)(params, ids_BS=tokens, positions_BS=positions, cache=kv).logits
        ours = functools.partial(distill_loss.forward, c=EXPERTS, pattern=FSFS, sparse=not dense, block=8)
        x, _ = quick(ours)(params, ids_BS=tokens)
        np.testing.assert_allclose(model.head(params, EXPERTS, x), expected, atol=2e-4)


# The run. ------------------------------------------------------------------------------------------------------------
GLM = Config.load(GOLDEN / "glm_all_full")
TEXT = np.random.default_rng(0).integers(3, 96, 24 * 13 + 1)
TEXT[1::2] = TEXT[::2][: TEXT[1::2].size]  # something to learn: every token comes twice
WINDOWS = np.stack([TEXT[i * 24 : i * 24 + 25] for i in range(13)]).astype(np.int32)


def settings(**options):
    return distill.settings_for(GLM, FSFS, **(dict(steps=6, warmup_steps=3, seq_len=24, dtype="float32") | options))


def tensors(directory):
    with safetensors.Reader(directory) as reader:
        out = {}
        for name, tensor in reader.tensors.items():
            out[name] = np.empty(tensor.shape, reader.dtype(name))
            reader.read_into(name, (0,) * len(tensor.shape), out[name])
    return out


class Stop(Exception):
    pass


def stop_at(step):
    def report(done, total, note=""):
        if done == step:
            raise Stop

    return report


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("distill") / "out"
    rows = distill.distill(GOLDEN / "glm_all_full", out, WINDOWS, settings(lr=(1e-3, 1e-3)))
    return out, rows


def test_resumed_weights_are_those_of_an_uninterrupted_run(finished, tmp_path):
    out, rows = finished
    run = functools.partial(
        distill.distill, GOLDEN / "glm_all_full", tmp_path / "out", WINDOWS, settings(lr=(1e-3, 1e-3)), save_every=2
    )
    for step in (3, 5):  # in warm-up, after step 2 was saved; in the sparse stage, after step 4
        with pytest.raises(Stop):
            run(resume=step > 3, report=stop_at(step))
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="continue it with --resume"):
        run()
    with pytest.raises(UserError, match="seed was 0, now 1"):
        distill.distill(GOLDEN / "glm_all_full", tmp_path / "out", WINDOWS, settings(seed=1), resume=True)
    resumed = run(resume=True)
    assert [(r["step"], r["index_loss"], r["lm_loss"]) for r in resumed] == [
        (r["step"], r["index_loss"], r["lm_loss"]) for r in rows
    ]
    assert [r["seconds"] for r in resumed] == sorted(r["seconds"] for r in resumed)
    jax.tree.map(np.testing.assert_array_equal, tensors(tmp_path / "out"), tensors(out))
    assert not (tmp_path / "out.incomplete").exists()


@pytest.mark.parametrize("c", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_models_of_one_kind_of_layers_can_be_written(c, tmp_path):
    params = weights(c, c.pattern)
    export.write(tmp_path, c, params, c.to_hf(), shard_bytes=20_000)
    assert Config.load(tmp_path) == c and len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = checkpoint.load_params(tmp_path, c, checkpoint.indexer_layers(tmp_path, c), "float32")
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_deepseek_v32_is_written_with_its_pattern(tmp_path):
    c = Config.load(GOLDEN / "deepseek_yarn")
    pattern = Pattern.uniform(c.num_hidden_layers, 2)
    held = c.replace(pattern=pattern)
    distill_files.write_model(tmp_path, GOLDEN / "deepseek_yarn", held, weights(c, pattern))
    assert json.loads((tmp_path / "config.json").read_text())["index_topk_pattern"] == str(pattern)
    assert Config.load(tmp_path) == held.replace(num_nextn_predict_layers=0)
    assert checkpoint.indexer_layers(tmp_path, held) == pattern.full_layers


def test_resume_is_refused_to_another_model(tmp_path):
    other = small.directory(tmp_path)
    data = bytearray((other / "model.safetensors").read_bytes())
    at = safetensors.read_header(other / "model.safetensors")["model.embed_tokens.weight"].offset
    data[at] ^= 1
    (other / "model.safetensors").write_bytes(data)
    with pytest.raises(Stop):
        distill.distill(GOLDEN / "glm_all_full", tmp_path / "out", WINDOWS, settings(), report=stop_at(2))
    with pytest.raises(UserError, match="was begun with other settings: model was"):
        distill.distill(other, tmp_path / "out", WINDOWS, settings(), resume=True)


def test_sparse_stage_trains_everything_but_the_router_bias(finished):
    before, after = tensors(GOLDEN / "glm_all_full"), tensors(finished[0])
    same = {name for name in after if np.array_equal(before[name], after[name])}
    assert all("e_score_correction_bias" in name for name in same)
    assert [r["stage"] for r in finished[1]] == ["warmup"] * 3 + ["sparse"] * 3
    assert [r["lm_loss"] is None for r in finished[1]] == [True] * 3 + [False] * 3


def test_warm_up_trains_the_kept_indexers_and_the_loss_goes_down(tmp_path):
    s = settings(stage="warmup", warmup_steps=None, steps=30, lr=[1e-2])
    rows = distill.distill(GOLDEN / "glm_all_full", tmp_path / "out", WINDOWS, s)
    losses = [row["index_loss"] for row in rows]
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    before, after = tensors(GOLDEN / "glm_all_full"), tensors(tmp_path / "out")
    gone, changed = before.keys() - after.keys(), {n for n in after if not np.array_equal(before[n], after[n])}
    assert gone == {n for n in before if ".indexer." in n and n.split(".")[2] in "13"}
    assert changed == {n for n in before if ".indexer." in n and n.split(".")[2] in "02"}
    data = json.loads((tmp_path / "out" / "config.json").read_text())
    assert data["indexer_types"] == ["full", "shared"] * 2 and "index_topk_freq" not in data
    with open(tmp_path / "out" / "losses.csv") as file:
        assert [float(row["index_loss"]) for row in csv.DictReader(file)] == losses


def test_sharded_and_accumulated_steps_are_the_same():
    """First moments of Adam are the gradient: equal on one device, and in two parts on two."""
    moments, stage = [], "warmup"
    for devices, accumulate in ((1, 1), (2, 2)):
        s = settings(stage=stage, warmup_steps=None, accumulate=accumulate, devices=devices)
        mesh = sharding.make_mesh({"data": devices})
        params = checkpoint.load_params(GOLDEN / "glm_all_full", GLM, FSFS.full_layers, "float32")
        same = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        state = jax.device_put({"params": params, "optimizers": distill.init_optimizers(params, stage)}, same)
        step = distill.make_step(GLM, FSFS, stage, mesh, loss="multi", dtype="float32", remat=False)
        state, metrics = step(state, distill.batch_at(WINDOWS, s, 0), np.float32(1e-3))
        assert metrics["ok"] and len(state["params"]["norm"].sharding.device_set) == devices
        moments.append(jax.device_get([a for a in jax.tree.leaves(state["optimizers"]) if a.ndim > 0]))
    for a, b in zip(*moments, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_patterns_of_as_many_full_layers_share_one_program():
    before, options = distill._program.cache_info().misses, dict(dtype="float32", remat=True)
    for pattern, loss in ((FSFS, "multi"), (Pattern("FFSS"), "multi"), (Pattern("FFSS"), "own")):
        distill.make_step(GLM, pattern, "sparse", sharding.make_mesh({}), loss=loss, **options)
    assert distill._program.cache_info().misses == before + 1
    own, multi = (distill_loss.shares(Pattern("FFSS"), loss) for loss in ("own", "multi"))
    assert own.share_L.tolist() == [1, 1, 0, 0] and multi.slot_L.tolist() == own.slot_L.tolist() == [0, 1, 1, 1]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), own) == jax.tree.map(lambda a: (a.shape, a.dtype), multi)


@pytest.mark.parametrize("save_every", [1, 100])
def test_a_loss_that_is_not_finite_goes_back_to_a_good_state(tmp_path, save_every):
    """Step 4 spoils the weights, which step 5 finds: the state after step 4 is worth nothing."""
    run = functools.partial(distill.distill, GOLDEN / "glm_all_full", tmp_path / "out", WINDOWS, save_every=save_every)
    with pytest.raises(UserError, match=r"not finite at step 5 .*the state after step 3 is kept in .*--resume and a lower"):
        run(settings(lr=(1e-3, 1e30)))
    assert not (tmp_path / "out").exists()
    assert [p.name for p in (tmp_path / "out.incomplete" / "state").iterdir()] == ["3"]
    with pytest.raises(UserError, match="is an unfinished conversion"):
        checkpoint.find(str(tmp_path / "out"))
    assert [row["step"] for row in run(settings(lr=(1e-3, 1e-6)), resume=True)] == [1, 2, 3, 4, 5, 6]


def test_nothing_good_was_saved(tmp_path):
    run = functools.partial(distill.distill, GOLDEN / "glm_all_full", tmp_path / "out", WINDOWS)
    with pytest.raises(UserError, match="not finite at step 2 .*no state before it was saved: lower --lr"):
        run(settings(stage="warmup", warmup_steps=None, lr=[3e38]), save_every=1)
    with pytest.raises(Stop):  # nothing is there to continue
        run(settings(seed=1), report=stop_at(1))


def test_ctrl_c_saves_what_was_done(finished, tmp_path):
    out, rows = finished
    run = functools.partial(
        distill.distill, GOLDEN / "glm_all_full", tmp_path / "out", WINDOWS, settings(lr=(1e-3, 1e-3)), save_every=100
    )

    def press(done, total, note):
        if done == 5:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="interrupted after step 5; the same command with --resume goes on"):
        run(report=press)
    resumed = run(resume=True)
    assert [r["index_loss"] for r in resumed] == [r["index_loss"] for r in rows]
    jax.tree.map(np.testing.assert_array_equal, tensors(tmp_path / "out"), tensors(out))


def test_a_save_is_not_interrupted_and_begins_with_the_table(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    from ic_jax import distill_files

    row = dict(zip(distill_files.COLUMNS, (1, "warmup", 0.5, 1.5, None, 2.0), strict=True))
    work, original = distill_files.Work(tmp_path / "out", {}, resume=False), ocp.StandardCheckpointer.save

    def save(*args, **kwargs):
        assert work.rows(1) == [row]  # a kill here would lose nothing
        signal.raise_signal(signal.SIGINT)
        original(*args, **kwargs)

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", save)
    with pytest.raises(KeyboardInterrupt):
        work.save(1, {"a": jnp.ones(3)}, [row])
    assert work.latest() == 1


def test_an_output_has_one_run_and_damaged_files_are_said(tmp_path, monkeypatch):
    from ic_jax import distill_files

    with monkeypatch.context() as patched:
        claimed = distill_files.store.claimed
        patched.setattr(distill_files.store, "claimed", lambda path: (tmp_path / "late").mkdir() or claimed(path))
        with pytest.raises(UserError, match="late already exists"):  # another run ended after this one had looked
            distill_files.Work(tmp_path / "late", {}, resume=True)
        assert [p.name for p in tmp_path.iterdir()] == ["late"]
    begin = functools.partial(distill_files.Work, tmp_path / "out", {"seed": 1})
    with begin(resume=False) as work:
        for resume in (False, True):
            with pytest.raises(UserError, match="out.incomplete is in use by another run"):
                begin(resume=resume)
    header = ",".join(distill_files.COLUMNS) + "\n"
    for table in (header + "1,warmup,x,1,1,1\n", header + ",,,,,\n", header + "1,1,1,1,1,1,1\n", "a,b\n1,2\n", "\xff"):
        (work.directory / distill_files.TABLE).write_bytes(table.encode("latin-1"))
        with pytest.raises(UserError, match="losses.csv is damaged .* delete it to go on"):
            work.rows(9)
    for content, message in (("[]", "does not hold"), ("{", "cannot be read"), ("[" * 100_000, "nested too deeply")):
        (work.directory / distill_files.SETTINGS).write_text(content)
        with pytest.raises(UserError, match=f"distill.json {message}|distill.json .*{message}"):
            begin(resume=True)


# The command. --------------------------------------------------------------------------------------------------------
def test_command_makes_a_checkpoint_that_loads_as_it_is(tmp_path, capsys):
    source = small.directory(tmp_path)
    (tmp_path / "text").write_text(small.text(120))
    pattern_file.write(tmp_path / "p.json", FSFS, GLM, "glm_all_full")
    flags = ["--model", str(source), "--pattern", str(tmp_path / "p.json"), "--text", str(tmp_path / "text")]
    flags += ["--steps", "2", "--stage", "warmup", "--remat", "--seq-len", "24", "--batch", "2"]
    flags += ["--out", str(tmp_path / "out")]
    assert distill.main([*flags, "--mesh", "data=2"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].split()[1:4:2] == ["step", "stage"] and len(printed.out.splitlines()) == 4
    assert "2 full / 2 shared  FSFS" in printed.err
    lm = ic_jax.load(str(tmp_path / "out"))
    assert lm.pattern == FSFS and lm.config.num_hidden_layers == 4
    assert distill.main(flags) == 2 and "already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"--steps": "0"}, "--steps must be >= 1, not 0"),
        ({"--text": "short"}, "the text has 5 tokens, one sequence needs 25"),
        ({"--text": "absent"}, "cannot be read"),
        ({"--pattern": "FSF"}, "3 characters, the model has 4 layers"),
        ({"--pattern": "SFFF"}, "layer 0 is S"),
        ({"--pattern": "other.json"}, "pattern file"),
        ({"--model": "glm4_lite_dense"}, "has no indexer"),
        ({"--model": "glm_indexer_types", "--pattern": "all-full"}, "this checkpoint has indexer weights only"),
        ({"--seq-len": "16"}, "within top-k 16"),
        ({"--seed": "-1"}, "--seed: must be an integer >= 0, not '-1'"),
        ({"--batch": "1000000000"}, "--batch 1000000000 is more than the 4 sequences of 24 tokens in the text"),
        ({"--steps": "1"}, "--steps 1 are too few for both stages"),
        ({"--accumulate": "3"}, "--batch 4 does not divide into --accumulate 3"),
        ({"--mesh": "tensor=2"}, "sharded over data only"),
        ({"--lr": "1e-3"}, "--lr takes one rate for one stage, and two for both"),
        ({"--warmup-steps": "9"}, "--warmup-steps must lie in 1..4"),
        ({"--out": "absent/out"}, "does not exist"),
    ],
)
def test_mistakes_are_one_line(changes, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("w3 w4 w5 w6 w7")
    (tmp_path / "text").write_text(small.text(100))
    pattern_file.write(tmp_path / "other.json", Pattern("FS"), GLM.replace(num_hidden_layers=2), "other")
    flags = {"--model": "glm_all_full", "--pattern": "FSFS", "--text": "text", "--steps": "5", "--seq-len": "24"}
    flags |= {"--out": "out"} | changes
    flags["--model"] = str(small.directory(tmp_path, flags["--model"]))
    assert distill.main([part for flag in flags.items() for part in flag]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("error: ") and message in error[-1]
    assert not list(tmp_path.glob("out*"))


def test_a_model_of_the_hub_has_its_repositorys_name(tmp_path, capsys, monkeypatch):
    directory = small.directory(tmp_path)
    monkeypatch.setattr(checkpoint, "find", lambda *args, **kwargs: directory)
    pattern_file.write(tmp_path / "p.json", FSFS, GLM, "GLM-5")
    (tmp_path / "text").write_text("w3")
    flags = f"--model zai-org/GLM-5 --pattern {tmp_path}/p.json --text {tmp_path}/text --steps 2 --out {tmp_path}/out"
    assert distill.main(flags.split()) == 2 and "the text has 1 tokens" in capsys.readouterr().err
