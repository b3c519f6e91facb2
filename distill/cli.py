"""The command line. Heavy imports wait until a command needs them, so that help answers at once."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from distill.arguments import parse
from distill.errors import Interrupted, UserError, one_line
from distill.registry import TABLES, own_error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    try:
        options = parse(arguments)
        with _ended_like_interrupted():
            text = COMMANDS[options.command](options)
        if text:
            print(text)
        _leave_processes()
        return 0
    except UserError as error:
        print(f"distill: error: {one_line(error)}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(f"distill: {error}", file=sys.stderr)
        _leave_processes()
        return 130
    except KeyboardInterrupt:
        print("distill: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, say, wherever something is written
        print(f"distill: error: {own_error(error) or one_line(error)}", file=sys.stderr)
        return 2
    except Exception as error:
        line = own_error(error)
        if line is None:  # a mistake of ours
            raise
        print(f"distill: error: {line}", file=sys.stderr)
        return 2


@contextmanager
def _ended_like_interrupted() -> Iterator[None]:
    """What a scheduler ends (SIGTERM) removes its temporary files, as after Ctrl-C."""
    mine = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() == mine:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)  # a process that reads data
        os.kill(os.getpid(), number)

    try:
        previous = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # only the main thread may
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _leave_processes() -> None:
    """Close the connection of several processes that end together: torch aborts now and then where
    it is open when one exits."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _train(options: argparse.Namespace) -> str:
    from distill.config import RunConfig
    from distill.recipe import load_config

    config = load_config(RunConfig, options.recipe, options.overrides)
    if options.dry_run:
        from distill.commands.dry_run import dry_run

        return dry_run(config, resume=options.resume)
    from distill.commands.train import train
    from distill.reporting.summary import report

    summary = train(config, resume=options.resume)
    return report(summary) if summary else ""  # the other processes have none


def _evaluate(options: argparse.Namespace) -> str:
    from distill.commands.evaluate import evaluate

    return evaluate(
        options.subject,
        options.overrides,
        protocol=options.protocol or "own",
        benchmark=options.benchmark,
        out=options.out,
    )


def _compare(options: argparse.Namespace) -> str:
    from distill.commands.compare import compare

    return compare(
        options.words,
        options.overrides,
        protocol=options.protocol,
        benchmark=options.benchmark,
        out=options.out,
        batch=options.batch,
        rounds=options.rounds,
    )


def _export(options: argparse.Namespace) -> str:
    from distill.commands.export import export_run

    return export_run(
        options.run,
        arm=options.arm,
        out=options.out,
        format=options.format,
        what=options.what,
        precision=options.precision,
        push=options.push,
        overrides=options.overrides,
    )


def _predict(options: argparse.Namespace) -> str:
    from distill.commands.predict import predict

    return predict(
        options.model,
        options.images,
        out=options.out,
        force=options.force,
        trust=options.trust,
    )


def _demo(options: argparse.Namespace) -> str:
    from distill.commands.demo import demo

    demo(options.model, port=options.port, trust=options.trust)
    return ""


def _report(options: argparse.Namespace) -> str:
    from distill.commands.report import write_report

    return write_report(
        options.runs,
        options.overrides,
        html=options.html,
        probe=options.probe,
        out=options.out,
    )


def _seeds(seeds: Sequence[str]) -> list[int]:
    """Seeds as numbers, each once."""
    for seed in seeds:
        if not seed.isdecimal():
            raise UserError(f"--seeds: a seed must be a whole number, got {seed!r}")
        if int(seed) >= 2**31:
            raise UserError(f"--seeds: {seed} is too large; seeds are below 2**31")
    numbers = [int(seed) for seed in seeds]
    for number in numbers:
        if numbers.count(number) > 1:
            raise UserError(f"--seeds: {number} is given twice in {' '.join(seeds)}")
    return numbers


def _sweep(options: argparse.Namespace) -> str:
    from distill.commands.sweep import sweep

    return sweep(
        options.study,
        options.overrides,
        only=options.only,
        seeds=_seeds(options.seeds),
        out=options.out,
        keep=options.keep,
        dry_run=options.dry_run,
    )


def _bench(options: argparse.Namespace) -> str:
    # Torch warns of tensors older than the trace of allocations, which are not to be counted.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from distill.commands.bench import bench
    from distill.config import RunConfig
    from distill.recipe import load_config

    config = None
    if options.recipe is not None:
        config = load_config(RunConfig, options.recipe, options.overrides)
    return bench(
        config,
        batch=options.batch,
        rounds=options.rounds,
        layer=options.layer,
        teacher=options.teacher,
        compile=options.compile,
        out=options.out,
    )


def _probe(options: argparse.Namespace) -> str:
    from distill.commands.probe import probe_teacher
    from distill.config import RunConfig
    from distill.recipe import load_config

    return probe_teacher(
        load_config(RunConfig, options.recipe, options.overrides),
        layers=options.layers,
        timesteps=options.timesteps,
        images=options.images,
        repeats=options.repeats,
        probe=options.probe,
        out=options.out,
        resume=options.resume,
    )


def _teacher_train(options: argparse.Namespace) -> str:
    from distill.recipe import load_config
    from distill.teacher_config import TeacherTrainConfig

    config = load_config(TeacherTrainConfig, options.recipe, options.overrides)
    if options.dry_run:
        from distill.commands.dry_run import teacher_dry_run

        return teacher_dry_run(config)
    from distill.commands.train_teacher import train_teacher

    folder = train_teacher(config, resume=options.resume)
    return (
        f"teacher written to {folder / 'pipeline'}; use it with teacher.path={folder / 'pipeline'}"
    )


def _teacher_extract(options: argparse.Namespace) -> str:
    from distill.commands.extract import extract
    from distill.config import RunConfig
    from distill.recipe import load_config

    return extract(load_config(RunConfig, options.recipe, options.overrides))


def _teacher_layers(options: argparse.Namespace) -> str:
    from distill.commands.dry_run import teacher_layers

    return teacher_layers(options.name, options.path, options.size, options.overrides)


def _policy_fit(options: argparse.Namespace) -> str:
    from distill.commands.policy_fit import fit_policy

    return fit_policy(
        options.table,
        policy=options.policy,
        options=options.overrides,
        steps=options.steps,
        batch=options.batch,
        seeds=_seeds(options.seeds),
        raw=options.raw,
        out=options.out,
    )


def _list(options: argparse.Namespace) -> str:
    lines = []
    for table in [options.table] if options.table else TABLES:
        if options.table is None:
            lines.append(f"{table}:")
        lines += [f"  {name:24} {target}" for name, target in TABLES[table].items()]
        if table == "students":
            lines.append("  (any timm model with feature maps; these are checked)")
    return "\n".join(lines)


COMMANDS: dict[str, Callable[[argparse.Namespace], str]] = {
    "train": _train,
    "evaluate": _evaluate,
    "compare": _compare,
    "export": _export,
    "predict": _predict,
    "demo": _demo,
    "report": _report,
    "sweep": _sweep,
    "bench": _bench,
    "probe": _probe,
    "teacher_train": _teacher_train,
    "teacher_extract": _teacher_extract,
    "teacher_layers": _teacher_layers,
    "policy_fit": _policy_fit,
    "list": _list,
}


if __name__ == "__main__":
    sys.exit(main())
