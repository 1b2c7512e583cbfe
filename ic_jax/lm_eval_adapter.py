"""A loaded model as a model of EleutherAI's lm-eval; lm-eval is imported only when something here is called.

lm_eval.simple_evaluate(model=lm_eval_adapter.adapter(ic_jax.load(…)), tasks=["hellaswag"])
"""

from __future__ import annotations

import importlib.util

import numpy as np

from .errors import UserError, not_finite


def require() -> None:
    """UserError when lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("ic-jax eval harness needs lm-eval: pip install lm-eval")


def score(lm, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """(log likelihood of ``continuation`` after ``context``, whether it is the greedy one); long contexts lose their
    beginning."""
    ids = [*context, *continuation][-(lm.max_context) :]
    n = min(len(continuation), len(ids) - 1)
    logits_TW = lm.logits(ids)[-n - 1 : -1].astype(np.float64)
    if not np.isfinite(logits_TW).all():
        raise not_finite("a request")
    targets = np.array(ids[-n:])
    top = logits_TW.max(-1, keepdims=True)
    logp_T = logits_TW[np.arange(n), targets] - top[:, 0] - np.log(np.exp(logits_TW - top).sum(-1))
    return float(logp_T.sum()), bool((logits_TW.argmax(-1) == targets).all())


def score_rolling(lm, start: list[int], ids: list[int]) -> float:
    """Log likelihood of all of ``ids``, in windows that fill the context and begin with the token before them."""
    total, context, n = 0.0, start[-1:], lm.max_context - 1
    for at in range(0, len(ids), n):
        total += score(lm, context, window := ids[at : at + n])[0]
        context = window[-1:]
    return total


def adapter(lm):
    """An ``lm_eval.api.model.LM`` that answers through ``lm``."""
    require()
    if lm.max_context < 2:
        raise UserError("a likelihood needs a context of at least 2 tokens")
    from lm_eval.api.model import LM

    start = [next(iter(sorted(lm.eos_ids)), 0)] if lm.tokenizer.bos_id is None else [lm.tokenizer.bos_id]
    encode = lambda text: lm.tokenizer.encode(text, add_special_tokens=False)

    class Adapter(LM):
        def loglikelihood(self, requests):
            out = []
            for context, continuation in (r.args for r in requests):
                # Tokens of the whole, cut where the context ends: a space may belong to the token after it.
                whole, n = encode(context + continuation), len(encode(context))
                n = min(n, len(whole) - 1)
                out.append(score(lm, [*start, *whole[:n]], whole[n:]))
            return out

        def loglikelihood_rolling(self, requests):
            return [score_rolling(lm, start, encode(r.args[0])) for r in requests]

        def generate_until(self, requests):
            out = []
            for context, options in (r.args for r in requests):
                until = options.get("until") or []
                stop = (until,) if isinstance(until, str) else tuple(until)
                limit = int(options.get("max_gen_toks", 256))
                ids = [*start, *encode(context)][-max(lm.max_context - limit, 1) :]
                out.append("".join(p.text for p in lm.stream(ids, max_tokens=limit, stop=stop)))
            return out

    return Adapter()


def evaluate(lm, tasks: list[str], limit: int | None = None) -> dict:
    """lm-eval's results by task."""
    require()
    import lm_eval

    return lm_eval.simple_evaluate(model=adapter(lm), tasks=tasks, limit=limit)["results"]
