"""Tokens to experts over several devices: gathered everywhere, or sent only to the devices that hold their experts.

    python benchmarks/exchange.py [--tokens 8192] [--width 2048] [--experts 64] [--chosen 4] [--out FILE.json]

Both ways there and back, bf16, random experts, every device of the host along one axis. *Gathered* is what the model does:
an all-gather, then a reduce-scatter of the sums. *Sent* is an all-to-all of blocks of fixed size, as large as the fullest
pair of devices needs, there and back, with the rows picked before and added up behind; experts themselves are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="of one device (8192)")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--chosen", type=int, default=4, help="experts a token")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax
    from jax.sharding import PartitionSpec

    p, N, D = jax.device_count(), args.tokens, args.width
    mesh = jax.make_mesh((p,), ("expert",))
    rng = np.random.default_rng(0)
    scores = rng.random((p * N, args.experts))
    home = np.argpartition(scores, args.chosen)[:, : args.chosen] * p // args.experts  # device of each chosen expert
    goes = (home[:, :, None] == np.arange(p)).any(1).reshape(p, N, p)
    room = int(goes.sum(1).max())  # rows of the fullest pair
    slots = np.full((p, p, room), N, np.int32)  # [from, to, place]: a token, or N for none
    for a, b in np.ndindex(p, p):
        found = np.flatnonzero(goes[a, :, b])
        slots[a, b, : len(found)] = found

    def gathered(x_ND, _):
        return lax.psum_scatter(lax.all_gather(x_ND, "expert", tiled=True), "expert", tiled=True)

    def sent(x_ND, slots_APR):
        slots_PR = slots_APR[0]
        there = lambda a: lax.all_to_all(a, "expert", 0, 0, tiled=True)
        rows = there(x_ND.at[slots_PR].get(mode="fill", fill_value=0))
        back = there(rows)  # where the experts would run
        zero = jnp.zeros(x_ND.shape, jnp.float32)
        return zero.at[slots_PR.reshape(-1)].add(back.reshape(-1, D).astype(jnp.float32), mode="drop").astype(x_ND.dtype)

    spec = PartitionSpec("expert")
    x = jax.device_put(rng.standard_normal((p * N, D)).astype(jnp.bfloat16), jax.NamedSharding(mesh, spec))
    slots = jax.device_put(slots, jax.NamedSharding(mesh, spec))
    found = dict(device=jax.devices()[0].device_kind, devices=p, jax=jax.__version__, tokens=N, width=D)
    found |= dict(share_sent=round(float(goes.mean()), 3), room=room)
    for name, f in (("gathered", gathered), ("sent", sent)):
        step = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(spec, spec), out_specs=spec))
        jax.block_until_ready(step(x, slots))
        times = []
        for _ in range(args.repeats):
            began = time.perf_counter()
            for _ in range(10):
                y = step(x, slots)
            jax.block_until_ready(y)
            times.append((time.perf_counter() - began) / 10)
        found[f"{name} ms"] = round(1e3 * statistics.median(times), 4)
        # A token comes back once from every device that had it, its own among them.
        copies = np.full(p * N, p) if name == "gathered" else goes.sum(-1).reshape(-1)
        want = copies[:, None] * np.asarray(x, np.float32)
        np.testing.assert_allclose(np.asarray(y, np.float32), want, rtol=2e-2, atol=1e-2)
    text = json.dumps(found)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
