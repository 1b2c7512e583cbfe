"""``ic-jax plan --model glm-5.2 --context 200000 --mesh tensor=8,expert=8 --chip v5p``: memory and time, beforehand.

Counts bytes and operations of one device from the Config alone (roofline.py, parallel.py); nothing is allocated.
``--compile`` also compiles the real programs for that many TPUs and reports the compiler's memory and collectives.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from pathlib import Path

from . import cli, roofline
from .errors import UserError

# One direction of the links of a JAX device, TB/s: NVIDIA's data sheets (NVLink, half of 0.9), cloud.google.com/tpu/docs
LINKS = {"h100": 0.45, "h200": 0.45, "v5e": 0.2, "v5p": 0.6, "v6e": 0.4, "v7x": 0.3}


class Layout:
    """A model, its caches and one mesh: what lies on a device, and what a step makes it do.

    All sizes in bytes of one device. ``sizes``: mesh axes as ``sharding.parse_mesh`` gives them. ``pattern``: None for
    dense attention. ``chip``: one of LINKS, whose kernels lay cache rows out. ``chunk``: prompt tokens of one step, None
    for the engine's choice. ``index_dtype``: None for ``dtype``.
    """

    def __init__(self, config, pattern, sizes, chip, *, context, batch, chunk, dtype="bfloat16", index_dtype=None):
        import jax.numpy as jnp

        from pallas_kernels import dispatch, latent_row_shape

        from . import cache, engine
        from .parallel import Parallel

        self.c, self.pattern, self.sizes, self.context, self.dtype = config, pattern, sizes, context, dtype
        self.p, self.index_dtype = Parallel(**sizes), index_dtype
        self.slots = pattern.n_full if pattern else 0
        self.columns = math.prod(latent_row_shape(config.latent_dim, jnp.dtype(dtype), on=dispatch.CHIPS[chip]))
        self.batch = -(-batch // self.p.data)
        chunk = chunk or engine.CHUNK[dispatch.CHIPS[chip].platform] * self.p.parts
        chunk = engine.chunk_of_each(chunk, self.batch, self.p.parts)
        # A chunk that the sequence axes do not divide would not be split.
        self.chunk = min(max(chunk // self.p.parts, 1) * self.p.parts, -(-context // self.p.parts) * self.p.parts)
        self.itemsize, self.index_itemsize = jnp.dtype(dtype).itemsize, jnp.dtype(index_dtype or dtype).itemsize
        self.tokens = cache.pages_for(context, cache.PAGE_SIZE * self.p.parts) * cache.PAGE_SIZE  # of one sequence
        self.key = config.index_head_dim * self.index_itemsize + (4 if self.index_itemsize == 1 else 0)

    @property
    def devices(self) -> int:
        return math.prod(self.sizes.values())

    def memory(self) -> dict[str, int]:
        """Weights, the two caches, and an estimate of what a prefill step needs beside them."""
        from . import sharding
        from .model import abstract_params

        c, p, B = self.c, self.p, self.batch
        rows, queries, X = B * self.tokens, B * self.chunk // p.parts, c.num_experts_per_tok
        K = min(c.index_topk, self.context) if self.pattern else 0
        gathered = rows * p.parts * (self.columns * self.itemsize + (self.key if self.slots else 0)) if p.parts > 1 else 0
        stream = queries * (6 * c.hidden_size + 3 * c.num_attention_heads // p.tensor * c.latent_dim) * self.itemsize
        routed = queries * p.expert * X * (2 * c.hidden_size + 3 * c.moe_intermediate_size // p.tensor) * self.itemsize
        return {
            "weights": sharding.bytes_per_device(*abstract_params(c, self.slots, self.dtype), self.sizes),
            "latent cache": rows * c.num_hidden_layers * self.columns * self.itemsize,
            "index keys": rows * self.slots * self.key,
            "workspace (estimate)": gathered + stream + max(routed, queries * K * 12) + (512 << 20),
        }

    def work(self, queries: int, start: int) -> dict[str, roofline.Part]:
        """The parts of one call on one device; queries that the sequence axes divide are split."""
        c, p = self.c, self.p
        split = p.parts > 1 and queries > 1
        parts = roofline.step(
            c, self.pattern, queries, start, batch=self.batch, itemsize=self.itemsize, index_itemsize=self.index_itemsize
        )
        out = {}
        for name, part in parts.items():
            flops, moved = part.flops / (p.parts if split or name in ("attention", "index_scores") else 1), part.moved
            if name in ("attention", "index_scores", "cache_writes") and not split:
                moved /= p.parts  # each device reads the rows it holds
            if name == "experts":
                flops, moved = part.flops / p.expert / (p.context if split else 1), moved / p.expert
            if name not in ("index_scores", "index_projections", "router", "cache_writes") or (split and "index" in name):
                flops /= p.tensor
            if name in ("projections", "dense_ffn", "experts", "shared_experts", "head", "embed"):
                moved /= p.tensor
            out[name] = part._replace(flops=flops, moved=moved)
        return out

    def exchanged(self, queries: int) -> tuple[float, int]:
        """(bytes that a device receives, collectives in a row) in one call; sums count twice, as rings move them."""
        c, p, B, L = self.c, self.p, self.batch, self.c.num_hidden_layers
        sparse, D, U = c.mlp_layer_types.count("sparse"), c.hidden_size, c.latent_dim
        split = p.parts > 1 and queries > 1
        mine = B * queries // (p.parts if split else 1)
        received, count = 0.0, 0

        def add(times, nbytes, ways, total=False):
            nonlocal received, count
            if ways > 1 and times:
                received += times * nbytes * (ways - 1) / ways * (2 if total else 1)
                count += times

        K = min(c.index_topk, self.context) if self.pattern else 0
        sums = functools.partial(add, nbytes=mine * D * self.itemsize, total=True)
        if split:
            sums(1 + 2 * L, ways=p.tensor)
            rows = self.tokens * p.parts * B
            add(L, B * queries * U * self.itemsize, p.parts)  # new latents
            add(L, rows * self.columns * self.itemsize, p.parts)  # a layer's cache
            add(self.slots, B * queries * self.key, p.parts)
            add(self.slots, rows * self.key, p.parts)
            add(2 * sparse, mine * p.expert * D * self.itemsize, p.expert)
            add(sparse, mine * p.expert * c.n_routed_experts * 4, p.expert)  # the router's product
        else:
            sums(1 + L - sparse, ways=p.tensor)
            sums(L, ways=p.tensor * p.parts)  # outputs of all heads and rows
            sums(sparse, ways=p.tensor * p.expert)
            add(L, mine * p.parts * c.num_attention_heads // p.tensor * 4, p.parts)  # their log-sum-exps
            add(self.slots, mine * p.parts * K * 8, p.parts)  # candidates and their scores
        if queries > 1:
            add(self.slots, mine * K * 4, p.tensor)
        return received, count

    def prefill(self) -> tuple[dict, float, int]:
        """(parts, bytes received, collectives) of prefilling the whole context, chunk by chunk."""
        starts = range(0, self.context, self.chunk)
        received, count = self.exchanged(self.chunk)
        parts = roofline.total(self.work(min(self.chunk, self.context - s), s) for s in starts)
        return parts, received * len(starts), count * len(starts)

    def decode(self) -> tuple[dict, float, int]:
        """The same of one more token behind the context."""
        return self.work(1, self.context - 1), *self.exchanged(1)


def least_mesh(config, pattern, chip: str, limit: int, **options) -> dict[str, int] | None:
    """The mesh of fewest devices (powers of two, at most ``limit``) that holds the model on ``chip``; None if none does.

    Of equally many devices, heads are divided first: tensor as far as a host goes (8), then expert, then context.
    """
    from . import sharding

    powers = [1 << i for i in range(limit.bit_length())]
    meshes = [dict(tensor=t, expert=e, context=x) for t, e, x in itertools.product(powers, repeat=3) if t * e * x <= limit]
    meshes.sort(key=lambda m: (math.prod(m.values()), m["tensor"] > 8, -m["tensor"], -m["expert"]))
    for sizes in meshes:
        try:
            sharding.check_mesh(config, sizes)
        except UserError:
            continue
        if sum(Layout(config, pattern, sizes, chip, **options).memory().values()) <= capacity(chip):
            return sizes
    return None


def capacity(chip: str) -> float:
    """Bytes of memory of one JAX device."""
    return roofline.limits(chip).memory * 1e9


def written(sizes: dict[str, int]) -> str:
    """A mesh as ``--mesh`` takes it."""
    return ",".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "tensor=1"


def _body(args) -> None:
    from . import config as configs
    from . import pattern_file, sharding

    if args.model not in configs.PRESETS and not Path(args.model).exists():
        raise UserError(f"--model {args.model} is no directory, and no preset: {', '.join(configs.PRESETS)}")
    config = configs.preset(args.model) if args.model in configs.PRESETS else configs.Config.load(args.model)
    name = pattern_file.model_name(args.model)
    sizes = dict.fromkeys(sharding.MESH_AXES, 1) | sharding.parse_mesh(args.mesh)
    sharding.check_mesh(config, sizes)
    if args.context > config.max_position_embeddings:
        raise UserError(f"--context {args.context} is more than the model's {config.max_position_embeddings} positions")
    pattern = None
    if not args.dense and config.has_indexer:
        chosen = cli.pattern(args, config.num_hidden_layers)
        parse = lambda: pattern_file.parse(chosen, config, name) if isinstance(chosen, str) else chosen
        pattern = config.pattern if chosen is None else parse()
    options = dict(
        context=args.context, batch=args.batch, chunk=args.prefill_chunk, dtype=args.dtype,
        index_dtype=args.index_dtype,
    )  # fmt: skip
    layout, console = Layout(config, pattern, sizes, args.chip, **options), cli.Console(args.quiet)
    memory, room = layout.memory(), capacity(args.chip)
    total = sum(memory.values())
    found = None if total <= room else least_mesh(config, pattern, args.chip, 1 << 14, **options)
    steps = {"prefill": layout.prefill(), "decode of a token": layout.decode()}
    out = dict(
        model=name, pattern="dense" if pattern is None else str(pattern), context=args.context, batch=args.batch,
        chip=args.chip, mesh=written(sizes), devices=layout.devices, bytes=memory, capacity=room, fits=total <= room,
        least_mesh=found and written(found), steps={k: _times(v, args.chip) for k, v in steps.items()},
    )  # fmt: skip
    if args.compile:
        from . import plan_compile

        out["compiled"] = plan_compile.programs(config, pattern, sizes, args.chip, layout)
    if args.json:
        console.json(out)
        return
    _show(console, out, config, pattern)


def _times(step, chip: str) -> dict:
    """Least seconds of a step's work, of its exchange, and the number of exchanges, at the data sheets' rates."""
    parts, received, count = step
    device = roofline.limits(chip)
    each = {name: roofline.seconds({name: part}, device) for name, part in parts.items()}
    link = received / (LINKS[chip] * 1e12)
    largest = max(each, key=each.get)
    return dict(work=sum(each.values()), exchange=link, exchanges=count, largest=largest, parts=each)


def _show(console: cli.Console, out: dict, config, pattern) -> None:
    shape = "dense attention" if pattern is None else f"IndexCache {pattern.summary()}"
    console.write(f"{out['model']} · {config.num_hidden_layers} layers · {shape}\n")
    console.write(
        f"{out['context']} tokens x {out['batch']} on {out['devices']} x {out['chip']} "
        f"({out['capacity'] / 1e9:.0f} GB each), mesh {out['mesh']}\n\n"
    )
    rows = [(kind, f"{n / 1e9:.2f}") for kind, n in out["bytes"].items()]
    total = sum(out["bytes"].values())
    console.table(("a device holds", "GB"), [*rows, ("in all", f"{total / 1e9:.2f}")])
    if out["fits"]:
        console.write(f"\nIt fits: {(out['capacity'] - total) / 1e9:.1f} GB are left.\n\n")
    else:
        best = f"the least mesh that holds it is {out['least_mesh']}" if out["least_mesh"] else "no mesh holds it"
        console.write(f"\nIt does not fit: {(total - out['capacity']) / 1e9:.1f} GB are missing; {best}.\n\n")
    console.table(
        ("at the data sheet's rates, at least", "work ms", "exchange ms", "exchanges", "largest part"),
        [
            (name, f"{t['work'] * 1e3:.2f}", f"{t['exchange'] * 1e3:.2f}", t["exchanges"],
             f"{t['largest']} {100 * t['parts'][t['largest']] / t['work']:.0f} %")
            for name, t in out["steps"].items()
        ],
    )  # fmt: skip
    for name, p in out.get("compiled", {}).items():
        console.write(f"\n{name}, compiled in {p['seconds']:.0f} s: ")
        console.write(", ".join(f"{k} {v / 1e9:.2f} GB" for k, v in p["bytes"].items()) + "\n")
        rows = [(kind, n, f"{size / 1e6:.1f}") for kind, (n, size) in p["collectives"].items()]
        console.table(("collective", "in the program", "MB a device in all"), rows)


def _parser():
    parser = cli.Parser("plan", "Memory and time of a model on a mesh, before anything loads.")
    parser.add_argument("--model", default="demo", metavar="NAME", help="a preset, or a directory with config.json (demo)")
    parser.add_argument("--context", type=cli.positive, default=4096, metavar="N", help="tokens of a sequence (4096)")
    parser.add_argument("--batch", type=cli.positive, default=1, metavar="N", help="sequences at a time (1)")
    parser.add_argument("--mesh", default="tensor=1", metavar="AXES", help="devices along named axes (one device)")
    parser.add_argument("--chip", choices=LINKS, default="h200", help="what the devices are (h200)")
    pattern = parser.add_mutually_exclusive_group()
    pattern.add_argument("--index-pattern", metavar="P", help="F or S a layer, uniform:N, all-full, or a file of search")
    pattern.add_argument("--index-freq", type=cli.positive, metavar="N", help="F every N layers, the Hugging Face rule")
    pattern.add_argument("--dense", action="store_true", help="attend to every token and run no indexer")
    parser.add_argument("--index-offset", type=int, metavar="M", help="where --index-freq begins to count (2)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of weights and latents")
    parser.add_argument("--index-dtype", choices=("bfloat16", "float32", "float8_e4m3fn"), help="of index keys (as --dtype)")
    parser.add_argument("--prefill-chunk", type=cli.positive, metavar="N", help="prompt tokens of one step (as generate)")
    parser.add_argument("--compile", action="store_true", help="compile the programs for these TPUs (needs libtpu)")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line of stdout")
    cli.add_common_flags(parser)
    return parser


def main(argv=None) -> int:
    """Exit status of ``ic-jax plan``."""
    return cli.run(_body, _parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
