"""The `normclip` command: `bench` measures speed and error on this machine, `study` tests the theory of clipping by experiments."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from normclip import __version__
from normclip._core import MOST_THREADS
from normclip.studies import NAMES

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options = parser.parse_args(argv)
    run: Callable[[argparse.Namespace, str], int] = options.run
    needed = ("torch", "rich") if run is _bench and not options.plot else ("torch", "rich", "matplotlib")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} not installed; run: pip install 'normclip[cli]'")
    return run(options, shlex.join(["normclip", *argv]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="normclip", description="Exact, fast gradient norms and clipping.")
    parser.add_argument("--version", action="version", version=f"normclip {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    bench = commands.add_parser(
        "bench",
        help="measure speed and error beside torch on this machine",
        description="Measure normclip beside torch: time, error against an exact reference, share of read bandwidth.",
    )
    bench.add_argument("--quick", action="store_true", help="small gradients, a few seconds: a smoke run")
    bench.add_argument("--json", type=_output_file(".json"), metavar="FILE", help="write all figures to FILE")
    bench.add_argument("--plot", type=_output_file(".svg", ".png"), metavar="FILE", help="draw FILE (.svg or .png)")
    bench.add_argument("--threads", type=_threads, metavar="N", help="threads for torch and normclip")
    bench.set_defaults(run=_bench)
    study = commands.add_parser(
        "study",
        help="put the theory of clipping to the test",
        description="Measure what the theory of clipping predicts, and say whether it holds. A study takes up to ten minutes on 2 cores.",
    )
    study.add_argument("name", choices=(*NAMES, "all"), metavar="NAME", help=f"{', '.join(NAMES)}; or all")
    study.add_argument("--out", type=_output_folder, metavar="DIR", help="write NAME.json and the plot NAME.svg to DIR")
    study.add_argument("--format", choices=("svg", "png"), default="svg", help="the format of plots (default: svg)")
    study.add_argument("--quick", action="store_true", help="one seed and small sizes, less than a minute: a smoke run, without verdicts")
    study.add_argument("--seeds", type=_seeds, metavar="N", help="repeat all for N seeds (default: 3); verdicts need 3")
    study.add_argument("--seed", type=int, default=0, metavar="N", help="the first seed (default: 0)")
    study.set_defaults(run=_study)
    return parser


def _output_file(*suffixes: str) -> Callable[[str], Path]:
    """An argument type for an output file, which checks before the run that the file can be written after it."""

    def output_file(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"{text!r} does not end in {' or '.join(suffixes)}")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}; create it first")
        touched = [*([path] if path.exists() else ()), *([path.resolve().parent] if _is_replaced(path) else ())]
        if path.is_dir() or not all(os.access(each, os.W_OK) for each in touched):
            raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
        return path

    return output_file


def _is_replaced(path: Path) -> bool:
    """Whether results are written to a new file that then takes this path; devices and pipes are written directly."""
    return path.is_file() or not path.exists()


def _output_folder(text: str) -> Path:
    """An argument type for an output folder, which is created before the run."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be made a folder: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return path


def _threads(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {MOST_THREADS}")
    return int(text)


def _seeds(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _bench(options: argparse.Namespace, command: str) -> int:
    # Imported here, as torch, rich and matplotlib are extras, which `main` has looked for.
    from normclip import bench
    from normclip.bench.report import print_report, progress_bar

    try:
        with progress_bar() as progress:
            report = bench.run(quick=options.quick, threads=options.threads, command=command, progress=progress)
    except bench.WrongAnswerError as error:
        sys.stderr.write(f"normclip bench: {error}\n")
        return 1
    results = _Results("bench")
    if options.json:
        results.write(options.json, partial(Path.write_text, data=report.to_json(), encoding="utf-8"))
    if options.plot:
        from normclip.bench.figure import draw

        results.write(options.plot, lambda path: draw(report, path))
    results.print(lambda console: print_report(report, console))
    return results.status


def _study(options: argparse.Namespace, command: str) -> int:
    from normclip import studies
    from normclip.bench.report import progress_bar
    from normclip.studies.report import Options

    count = options.seeds or (1 if options.quick else 3)
    seeds = tuple(range(options.seed, options.seed + count))
    results = _Results("study")
    for name in studies.NAMES if options.name == "all" else (options.name,):
        if results.closed and not options.out:
            break  # nobody would see the others
        with progress_bar() as progress:
            report = studies.study(name, Options(quick=options.quick, seeds=seeds, progress=progress), command)
        if options.out:
            results.write(options.out / f"{name}.json", partial(Path.write_text, data=report.to_json(), encoding="utf-8"))
            results.write(options.out / f"{name}.{options.format}", report.draw)
        results.print(report.print)
    return results.status


class _Results:
    """Prints and writes results. If one cannot be written, reports that in one line on stderr, and goes on with the others."""

    def __init__(self, command: str) -> None:
        from rich.console import Console

        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # an ASCII locale cannot show ×, and shows ? instead
        self.console = Console()
        if not self.console.is_terminal:
            self.console = Console(width=140)  # a pipe has no width, for which rich would assume 80
        self.command = command
        self.status = 0
        self.closed = False

    def print(self, results: Callable[[Console], None]) -> None:
        """Print results on the console. A reader that has left, such as `head`, is no error."""
        with self._reporting("standard output"):
            try:
                with self.console.capture() as printed:
                    results(self.console)
                sys.stdout.write(printed.get())
                sys.stdout.flush()  # raises here, not when Python exits, if for example the disk is full
            except OSError as error:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout again when it exits
                if not isinstance(error, BrokenPipeError):
                    raise
                self.closed = True

    def write(self, path: Path, results: Callable[[Path], object]) -> None:
        """Write results to a file, which is left as it was if that fails."""
        with self._reporting(str(path)):
            if not _is_replaced(path):
                results(path)
                return
            target = path.resolve()  # the file itself where the path is a link
            beside = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
            try:
                results(beside)
                beside.replace(target)
            finally:
                beside.unlink(missing_ok=True)

    @contextmanager
    def _reporting(self, where: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.status = 1
            sys.stderr.write(f"normclip {self.command}: cannot write {where}: {error.strerror or error}\n")
