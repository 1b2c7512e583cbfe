"""What neighbouring queries of the 30B shape share under ``random_weights.alike``: layer 0, full width, on a CPU.

    python benchmarks/neighbours.py [--tokens 10000,60000,120000,200000] [--ratios 0,10,64] [--pairs 8]

Scores single pairs of neighbours, evenly spread over each prompt behind top-k tokens, against every earlier key. Deeper
layers are left out: their inputs need the whole model (``ic-jax bench --preset`` measures those).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from ic_jax import attention, cli, config, model, random_weights  # noqa: E402
from pallas_kernels import reference  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = lambda text: [int(t) for t in text.split(",")]
    parser.add_argument("--tokens", type=numbers, default=[10_000, 60_000, 120_000, 200_000])
    parser.add_argument("--ratios", type=numbers, default=[0, 10, 64])
    parser.add_argument("--pairs", type=int, default=8)
    args = parser.parse_args()
    c = config.preset("glm-4.7-flash-dsa").replace(num_hidden_layers=1, mlp_layer_types=("dense",))
    # Only what layer 0 reads, and a vocabulary of the prompt's size: every token once.
    c, K = c.replace(vocab_size=max(args.tokens) + 1, intermediate_size=16), c.index_topk
    natural = model.init_params(c, 1, jax.random.key(0, impl="rbg"))
    rows = []
    for ratio in args.ratios:
        params = random_weights.alike(jax.tree.map(jnp.copy, natural), c, float(ratio)) if ratio else natural
        p, indexer = (jax.tree.map(lambda a: a[0], params[name]) for name in ("layers", "indexer"))

        @jax.jit
        def inputs(positions_S, params=params, p=p):
            tables = attention.rope_tables(c, positions_S[None])
            h_BSD, qa_BSQ, _, _ = attention.project(c, p, params["embed_tokens"][positions_S][None], tables)
            return h_BSD, qa_BSQ, tables

        keys = jax.jit(lambda s, inputs=inputs, indexer=indexer: attention.index_keys(c, indexer, *inputs(s)[::2])[0])
        blocks = [keys(jnp.arange(s, min(s + 4096, c.vocab_size))) for s in range(0, c.vocab_size, 4096)]
        keys_TJ = jnp.concatenate(blocks)

        @jax.jit
        def scores(positions_S, inputs=inputs, indexer=indexer, keys_TJ=keys_TJ):
            q_BSIJ, w_BSI = attention.index_queries(c, indexer, *inputs(positions_S))
            return reference.index_scores(q_BSIJ[0], w_BSI[0], keys_TJ)

        for tokens in args.tokens:
            shared = []
            for t in np.linspace(K, tokens - 1, args.pairs + 1).astype(int)[1:]:
                scores_2T = np.asarray(scores(jnp.arange(t - 1, t + 1)))
                a, b = (set(np.argpartition(-s[: t + i], K - 1)[:K].tolist()) for i, s in enumerate(scores_2T))
                shared.append(len(a & b) / K)
            mean, low, high = np.mean(shared), min(shared), max(shared)
            rows.append((ratio, tokens, f"{100 * mean:.1f} %", f"{100 * low:.0f}-{100 * high:.0f} %"))
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, bf16, top-k {K}, {args.pairs} pairs a prompt\n")
    print(cli.table(("ratio", "tokens", "shared, mean", "from early to late in the prompt"), rows))


if __name__ == "__main__":
    main()
