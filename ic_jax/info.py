"""``ic-jax info [--json] [--chip v6e]``: devices, versions, and for every op what runs here and why not the others.

Also says, for ``generate`` and others, which implementation each op of a model will take, before weights load.
"""

from __future__ import annotations

import platform as host
import sys

from . import cli

CHIPS = ("h100", "h200", "v5e", "v5p", "v6e", "v7x")  # the names of dispatch.CHIPS, which importing would cost jax
CONTEXT = 32768  # tokens in the caches of the shapes asked about
QUERIES = {"prefill": 2048, "decode": 1}
FULL_SIZE = "glm-4.7-flash-dsa"


def op_arguments(
    c, queries: int, *, context=CONTEXT, batch=1, dtype="bfloat16", index_dtype=None, implementation="auto", on=None
) -> dict:
    """For every op, the (args, kwargs) with which the model of Config ``c`` calls it, as ShapeDtypeStructs.

    Index queries take the dtype of the index keys when that is FP8, as in the model. ``on``: a value of dispatch.CHIPS.
    """
    import jax
    import jax.numpy as jnp

    from pallas_kernels import latent_row_shape

    from .cache import PAGE_SIZE, pages_for

    def spec(shape, kind=dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(kind))

    B, S, U = batch, queries, c.latent_dim
    pages = pages_for(context)
    rows = B * pages * PAGE_SIZE
    K, G = min(c.index_topk, pages * PAGE_SIZE), max(c.pattern.n_full, 1)
    fp8 = index_dtype is not None and jnp.dtype(index_dtype).itemsize == 1
    query_dtype = index_dtype if fp8 else dtype
    scalar, table, positions = spec((), "int32"), spec((B, pages), "int32"), spec((B, S), "int32")
    row_shape = latent_row_shape(U, jnp.dtype(dtype), implementation, on=on)
    q, pool = spec((B, S, c.num_attention_heads, U)), spec((c.num_hidden_layers, rows, *row_shape))
    keys = spec((G, rows, c.index_head_dim), index_dtype or dtype)
    scales = spec((G, rows), "float32") if fp8 else None
    attention = dict(scale=c.softmax_scale, value_dim=c.kv_lora_rank)
    layers, E, F = max(c.mlp_layer_types.count("sparse"), 1), c.n_routed_experts, c.moe_intermediate_size
    experts, group_sizes = spec((layers, E, c.hidden_size, F)), spec((E,), "int32")
    sorted_rows = spec((B * S * c.num_experts_per_tok, c.hidden_size))
    return {
        "index_topk": (
            (spec((B, S, c.index_n_heads, c.index_head_dim), query_dtype), spec((B, S, c.index_n_heads), "float32"),
             (keys, scales), scalar, table, positions, spec((B,), "int32")),
            dict(k=K, page_size=PAGE_SIZE),
        ),
        "plan_rows": ((spec((B, S, K), "int32"), table, c.num_attention_heads, pool), dict(page_size=PAGE_SIZE)),
        "sparse_mla": ((q, pool, scalar, spec((B, S, K), "int32")), attention),
        "dense_mla": ((q, pool, scalar, table, positions), attention | dict(page_size=PAGE_SIZE)),
        "grouped_matmul": ((sorted_rows, experts, scalar, group_sizes), {}),
        "grouped_swiglu": ((sorted_rows, experts, experts, scalar, group_sizes), {}),
        "expert_matmul": (
            (spec((B * S, c.hidden_size)), experts, scalar, spec((B * S, c.num_experts_per_tok), "int32")), {},
        ),
        "layer_matmul": (
            (spec((B, S, c.hidden_size)), spec((c.num_hidden_layers, c.q_lora_rank, c.hidden_size)), scalar), {},
        ),
    }  # fmt: skip


def implementations(c, implementation: str = "auto", *, dense=False, **shapes) -> dict[str, str]:
    """What each attention op of a model runs through, ``{"index_topk": "gpu", …}``, worst of prefill and decode.

    Raises NotImplementedError when a forced ``implementation`` cannot run this model. ``shapes`` as ``op_arguments``.
    """
    from pallas_kernels import dispatch

    chosen: dict[str, str] = {}
    for queries in QUERIES.values():
        arguments = op_arguments(c, queries, implementation=implementation, **shapes)
        for op in ("dense_mla",) if dense or not c.has_indexer else ("index_topk", "sparse_mla"):
            forced = implementation if op != "dense_mla" or implementation == "reference" else "auto"
            args, kwargs = arguments[op]
            found = dispatch.choose(op, forced, *args, **kwargs)
            chosen[op] = found if chosen.get(op, found) == found else f"{chosen[op]}/{found}"
    return chosen


def report(chip: str | None = None) -> list[dict]:
    """One entry for every op, model and step: what runs on ``chip`` (None: this process's), and why others do not."""
    from pallas_kernels import dispatch

    from . import config

    out, on = [], dispatch.CHIPS[chip] if chip else None
    for model in (FULL_SIZE, "demo"):
        if model == "demo" and not (config.DEMO_DIRECTORY / "config.json").is_file():
            continue
        c = config.preset(model)
        for step, queries in QUERIES.items():
            for op, (args, kwargs) in op_arguments(c, queries, on=on).items():
                backends = [on.platform] if on else dispatch.IMPLEMENTATIONS[2:]
                reasons = {b: _reason(dispatch, op, b, args, kwargs, on) for b in backends}
                runs = next((b for b, reason in reasons.items() if reason is None), "reference")
                against = {b: reason for b, reason in reasons.items() if reason is not None}
                out.append(dict(op=op, model=model, step=step, runs=runs, against=against))
    return out


def _reason(dispatch, op, backend, args, kwargs, on) -> str | None:
    try:
        return dispatch.reason_against(op, backend, *args, on=on, **kwargs)
    except ModuleNotFoundError as e:
        if not (e.name or "").startswith("pallas_kernels."):
            return f"needs the package {e.name}"
        return f"no {backend} kernel for {op} yet"


def versions() -> dict[str, str]:
    """Versions of what decides results and speed."""
    import flax
    import jax
    import jaxlib

    from . import __version__

    found = {"ic-jax": __version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__, "flax": flax.__version__}
    return found | {"python": host.python_version()}


def devices() -> list[dict]:
    """The devices JAX sees: kind, platform, how many, and memory in GB where the platform tells."""
    import jax

    out: dict[str, dict] = {}
    for device in jax.devices():
        entry = out.setdefault(device.device_kind, dict(kind=device.device_kind, platform=device.platform, count=0))
        entry["count"] += 1
        if device.process_index == jax.process_index() and (limit := (device.memory_stats() or {}).get("bytes_limit")):
            entry["memory_gb"] = limit / 1e9
    return list(out.values())


def _merged(entries: list[dict]) -> list[dict]:
    """Entries with the steps that have the same answer in one row."""
    rows: dict[tuple, dict] = {}
    for e in entries:
        key = (e["op"], e["model"], e["runs"], *e["against"].items())
        rows.setdefault(key, e | dict(step=[]))["step"].append(e["step"])
    return [r | dict(step=", ".join(r["step"])) for r in rows.values()]


def _body(args) -> None:
    console = cli.Console(args.quiet)
    entries = report(args.chip)
    if args.json:
        console.json(dict(versions=versions(), devices=devices(), chip=args.chip, ops=entries))
        return
    console.write(" · ".join(f"{name} {version}" for name, version in versions().items()) + "\n")
    for d in devices():
        memory = f", {d['memory_gb']:.1f} GB each" if "memory_gb" in d else ""
        console.write(f"{d['count']} x {d['kind']} ({d['platform']}{memory})\n")
    console.write("\n" + (f"On {args.chip} (asked for, not found here):\n" if args.chip else ""))
    rows = [
        (e["op"], e["model"], e["step"], e["runs"], "; ".join(f"{b}: {why}" for b, why in e["against"].items()))
        for e in _merged(entries)
    ]
    console.table(("op", "model", "step", "runs", "why not"), rows)


def _parser():
    parser = cli.Parser("info", "Devices, versions, and which kernel runs where and why.")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line of stdout")
    parser.add_argument("--chip", choices=CHIPS, help="answer for this chip rather than for the devices found")
    cli.add_common_flags(parser)
    return parser


def main(argv=None) -> int:
    """Exit status of ``ic-jax info``."""
    return cli.run(_body, _parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
