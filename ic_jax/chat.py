"""``ic-jax chat``: a conversation in the terminal with a model that has a chat template.

``/reset`` forgets the conversation, ``/exit`` or ctrl-d ends it, ctrl-c stops an answer. Lines are read from stdin,
answers go to stdout, the rest to stderr, so a conversation can be scripted: ``ic-jax chat -q < questions.txt``. A message
that fails is left out of the conversation; unless stdin is a terminal, the exit status is then 2.
"""

from __future__ import annotations

import sys

from . import cli, pattern_file
from .errors import UserError
from .generate import title

HELP = "/reset forgets the conversation, /exit or ctrl-d ends it, ctrl-c stops an answer"


def read_line(console: cli.Console) -> str | None:
    """The next line of the user, None at the end. On a terminal, with line editing."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        try:
            return input("> ")
        except EOFError:
            console.write("\n")
            return None
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


def check_utf8(line: str) -> None:
    """UserError when ``line``, decoded with surrogateescape, holds bytes that are not UTF-8."""
    try:
        line.encode()
    except UnicodeEncodeError as e:
        byte, offset = ord(line[e.start]) & 0xFF, len(line[: e.start].encode())
        raise UserError(f"the message is not UTF-8 text: byte 0x{byte:02x} at offset {offset}") from None


def answer(lm, messages: list[dict], args, params, console: cli.Console) -> str:
    """The streamed answer to ``messages``; what there is of it when the user presses ctrl-c."""
    text, piece = "", None
    try:
        for piece in lm.stream_chat(messages, max_tokens=args.max_tokens, sampling=params):
            text += piece.text
            console.write(piece.text)
    except KeyboardInterrupt:
        console.status("\n(stopped)")
    except UserError as e:  # too long for the context, most likely: the conversation can be mended
        raise UserError(f"{e} (/reset begins anew)") from None
    console.write("\n")
    if piece is not None:
        cut = f", cut at -m {args.max_tokens}" if piece.finish_reason == "length" else ""
        console.status(f"[{piece.generation_tokens} tokens, {piece.generation_tps:.1f} tokens-per-sec{cut}]")
    return text


def converse(lm, args, params, console: cli.Console) -> int:
    """Read, answer and remember until the user leaves; how many messages failed."""
    start = [] if args.system_prompt is None else [dict(role="system", content=args.system_prompt)]
    messages, failed = list(start), 0
    while (line := read_line(console)) is not None:
        command = line.strip()
        if command in ("/exit", "/quit"):
            break
        if command == "/reset":
            messages = list(start)
            console.status("(the conversation is forgotten)")
        elif command == "/help":
            console.status(HELP)
        elif command:
            question = dict(role="user", content=line)
            try:
                check_utf8(line)
                text = answer(lm, [*messages, question], args, params, console)
            except UserError as e:
                console.complain(str(e))
                failed += 1
                continue
            messages += [question, dict(role="assistant", content=text)]
    return failed


def _body(args) -> None:
    params = cli.sampling(args)
    if args.coordinator or args.num_processes:
        raise UserError("a conversation has one process; several serve ic-jax generate")
    from .config import Config
    from .tokenizer import Tokenizer

    directory = cli.model_directory(args)
    config = Config.load(directory)
    cli.pattern(args, config.num_hidden_layers)
    if not Tokenizer(directory).has_chat_template:
        raise UserError(f"{pattern_file.model_name(args.model)} has no chat template; for plain text: ic-jax generate")
    console = cli.Console(args.quiet)
    lm = cli.load(args, console)
    console.status(title(lm))
    console.status(HELP)
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  (gives input() line editing and history)
    sys.stdin.reconfigure(encoding=None if terminal else "utf-8", errors="surrogateescape")
    if converse(lm, args, params, console) and not terminal:
        sys.exit(2)


def _parser():
    piped = "Unless stdin is a terminal, the exit status is 2 when a message failed; the others are answered."
    parser = cli.Parser("chat", f"A conversation in the terminal. {HELP[0].upper()}{HELP[1:]}. {piped}")
    parser.add_argument("--system-prompt", metavar="TEXT", help="a system message before the conversation")
    cli.add_sampling_flags(parser)
    cli.add_model_flags(parser)
    return parser


def main(argv=None) -> int:
    """Exit status of ``ic-jax chat``."""
    return cli.run(_body, _parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
