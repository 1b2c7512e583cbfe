"""``python -m ic_jax.generate -p "…"``: stream the continuation of a prompt, or the answer of a chat model.

The text goes to stdout; status and statistics to stderr. Everything about flags, prompt and context is checked before
weights load. Without ``--model`` it runs on the embedded demo model.
"""

from __future__ import annotations

import sys

from . import cli
from .errors import UserError


def read_prompt(args) -> str:
    """The text of ``-p``, ``-p -``, ``--file F`` or ``--file -`` as it is: no escapes, nothing stripped.

    Raises UserError when there is none, it is empty, or it is not UTF-8.
    """
    if args.prompt is None and args.file is None:
        raise UserError('there is no prompt; give one with -p "…", --file prompt.txt, or -p - to read stdin')
    if args.prompt not in (None, "-"):
        source, text = "-p", args.prompt
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError("-p: the prompt is not valid UTF-8") from None
    else:
        source = "stdin" if args.file in (None, "-") else args.file
        try:
            if source == "stdin":
                data = sys.stdin.buffer.read()
            else:
                with open(source, "rb") as f:
                    data = f.read()
            text = data.decode("utf-8")
        except UnicodeDecodeError as e:
            raise UserError(f"{source} is not UTF-8 text: byte 0x{data[e.start]:02x} at offset {e.start}") from None
        except OSError as e:
            raise UserError(f"{source} cannot be read: {e.strerror or e}") from None
    if not text:
        raise UserError(f"the prompt is empty ({source})")
    return text


def prompt_ids(args, tokenizer, text: str) -> list[int]:
    """Token ids of the prompt: through the chat template when there is one and ``--no-chat-template`` is not given.

    Raises UserError for a system prompt that nothing would read.
    """
    chat = tokenizer.has_chat_template and not args.no_chat_template
    if not chat:
        if args.system_prompt is not None:
            why = "--no-chat-template is given" if args.no_chat_template else "this model has no chat template"
            raise UserError(f"--system-prompt needs a chat template, but {why}")
        return tokenizer.encode(text)
    system = [] if args.system_prompt is None else [dict(role="system", content=args.system_prompt)]
    prompt = tokenizer.apply_chat_template([*system, dict(role="user", content=text)])
    return tokenizer.encode(prompt, add_special_tokens=False)


def check_prompt(ids: list[int], args, config) -> None:
    """UserError when ``ids`` is empty, names tokens the model lacks, or leaves no room for an answer."""
    if not ids:
        raise UserError("the prompt is empty: it has no tokens")
    if max(ids) >= config.vocab_size:
        raise UserError(
            f"the prompt has token id {max(ids)}, the model's vocabulary has {config.vocab_size} entries; "
            "tokenizer.json belongs to another model"
        )
    context = min(args.max_context or config.max_position_embeddings, config.max_position_embeddings)
    if len(ids) >= context:
        more = "" if context == config.max_position_embeddings else "; raise --max-context"
        raise UserError(f"the prompt has {len(ids)} tokens, the context holds {context}{more}")


def title(lm) -> str:
    """First line of the status: model, layers, pattern, top-k."""
    parts = [lm.name, f"{lm.config.num_hidden_layers} layers"]
    if lm.pattern is None:
        parts.append("dense attention, no indexer")
    else:
        parts += [f"IndexCache {lm.pattern.summary()}", f"top-k {lm.config.index_topk}"]
    return " · ".join(parts)


def machine(lm, args) -> str:
    """Second line of the status: devices, implementations, and compile time once known."""
    import jax

    from . import info, sharding

    count = 1
    for size in (sharding.parse_mesh(args.mesh) if args.mesh else {}).values():
        count *= size
    shapes = dict(dtype=args.dtype, index_dtype=args.index_dtype)
    chosen = info.implementations(lm.config, args.implementation, dense=lm.pattern is None, **shapes)
    parts = [f"{count} x {jax.devices()[0].device_kind}", " ".join(f"{op}={name}" for op, name in chosen.items())]
    if lm.compile_seconds:
        parts.append(f"compiled in {lm.compile_seconds:.1f} s")
    return " · ".join(parts)


def _body(args) -> None:
    params = cli.sampling(args)
    text = read_prompt(args)
    from . import sharding
    from .config import Config
    from .tokenizer import Tokenizer

    directory = cli.model_directory(args)
    config = Config.load(directory)
    cli.pattern(args, config.num_hidden_layers)
    ids = prompt_ids(args, Tokenizer(directory), text)
    check_prompt(ids, args, config)
    cli.start(args)
    sharding.check_alike({"the prompt": ids})

    console = cli.Console(args.quiet)
    lm = cli.load(args, console)
    console.status(title(lm))
    pieces, piece = [], None
    try:
        for piece in lm.stream(ids, max_tokens=args.max_tokens, sampling=params):
            if not pieces:
                console.status(machine(lm, args))
                console.status(cli.RULE)
            pieces.append(piece)
            if not args.json:
                console.write(piece.text)
    finally:  # interrupted as well: the error gets a line of its own
        if pieces and not args.json:
            console.write("\n")
    console.status(cli.RULE)
    console.status(f"Prompt: {piece.prompt_tokens} tokens, {piece.prompt_tps:.1f} tokens-per-sec")
    console.status(f"Generation: {piece.generation_tokens} tokens, {piece.generation_tps:.1f} tokens-per-sec")
    peak = cli.peak_memory_gb()
    console.status(f"Peak memory: {peak:.3f} GB")
    if args.json:
        console.json(
            dict(
                text="".join(p.text for p in pieces),
                tokens=[p.token for p in pieces],
                prompt_tokens=piece.prompt_tokens,
                generation_tokens=piece.generation_tokens,
                prompt_tps=piece.prompt_tps,
                generation_tps=piece.generation_tps,
                finish_reason=piece.finish_reason,
                pattern="dense" if lm.pattern is None else str(lm.pattern),
                peak_memory_gb=peak,
            )
        )


def _parser():
    parser = cli.Parser("generate", "Stream the continuation of a prompt, or the answer of a chat model.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt; - reads stdin")
    source.add_argument("--file", metavar="FILE", help="read the prompt from a UTF-8 file; - reads stdin")
    parser.add_argument("--system-prompt", metavar="TEXT", help="a system message before the prompt")
    parser.add_argument("--no-chat-template", action="store_true", help="continue the prompt as plain text")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line of stdout, no streaming")
    cli.add_sampling_flags(parser)
    cli.add_model_flags(parser)
    return parser


def main(argv=None) -> int:
    """Exit status of ``ic-jax generate``."""
    return cli.run(_body, _parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
