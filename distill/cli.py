"""The command line. Heavy imports wait until a verb needs them, so that help answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from distill.errors import Interrupted, UserError
from distill.registry import TABLES

EXAMPLES = """examples:
  distill train experiments/quickstart.yaml
  distill train experiments/camvid.yaml data.root=DATA/camvid data.labelled=46 name=camvid46
  distill train runs/camvid46/config.yaml --resume
  distill evaluate runs/camvid46 data.root=DATA/camvid
  distill teacher train experiments/teachers/images.yaml data.root=MY_IMAGES
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    try:
        options = _parse(arguments)
        code: int = options.verb(options)
        return code
    except UserError as error:
        print(f"distill: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"distill: {str(error) or 'stopped'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options and overrides in any order, which argparse alone refuses within a verb."""
    options, rest = build_parser().parse_known_args(arguments)
    for argument in rest:
        if argument.startswith("-") or "=" not in argument or not hasattr(options, "overrides"):
            raise UserError(f"unrecognised argument {argument!r} (see distill --help)")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def build_parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    parser = _Parser(
        prog="distill",
        description="Distil a diffusion model into a small, fast, label-efficient vision backbone.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    train = verbs.add_parser("train", help="distil a teacher into a student, as a recipe says")
    _add_recipe(train)
    train.set_defaults(verb=_train)

    evaluate = verbs.add_parser("evaluate", help="score a student on a benchmark")
    evaluate.add_argument("student", metavar="STUDENT", help="an exported student, or a run folder")
    evaluate.add_argument(
        "--head",
        choices=("own", "linear"),
        default="own",
        help="its own head, or a new linear one fitted on the frozen backbone (default: own)",
    )
    evaluate.add_argument("--out", metavar="JSON", help="where the scores go (default: none)")
    _add_overrides(evaluate)
    evaluate.set_defaults(verb=_evaluate)

    export = verbs.add_parser("export", help="write a run's student as a folder that timm opens")
    export.add_argument("run", metavar="RUN", help="a run folder")
    export.add_argument("--arm", default="distilled", help="which arm (default: distilled)")
    export.add_argument("--out", metavar="FOLDER", help="where (default: RUN/student)")
    export.set_defaults(verb=_export)

    report = verbs.add_parser("report", help="compare finished runs with different seeds")
    report.add_argument("runs", metavar="RUN", nargs="+", help="run folders")
    report.add_argument("--out", metavar="JSON", help="where the figures go (default: none)")
    report.set_defaults(verb=_report)

    bench = verbs.add_parser("bench", help="time a distillation step against the naive one")
    bench.add_argument(
        "--out", metavar="JSON", help="where the figures go, with a chart beside (default: none)"
    )
    bench.add_argument("--batch", type=int, default=64, help="images a step (default: 64)")
    bench.add_argument("--rounds", type=int, default=5, help="rounds, in turn (default: 5)")
    bench.add_argument("--layer", default="mid_block", help="teacher layer (default: mid_block)")
    bench.add_argument(
        "--teacher", metavar="PATH", help="a UNet (default: CIFAR-10's DDPM, random weights)"
    )
    bench.add_argument("--compile", action="store_true", help="with torch.compile")
    bench.set_defaults(verb=_bench)

    probe = verbs.add_parser(
        "probe", help="map what a teacher's layers and timesteps know of the labels"
    )
    probe.add_argument("recipe", metavar="RECIPE.yaml", help="a recipe; its student plays no part")
    _add_overrides(probe)
    probe.add_argument(
        "--layers", metavar="LAYER", nargs="+", default=[], help="of the teacher (default: all)"
    )
    probe.add_argument("--timesteps", type=int, default=12, help="how many (default: 12)")
    probe.add_argument("--images", type=int, help="of train and of val at most (default: all)")
    probe.add_argument("--seeds", type=int, default=1, help="repetitions (default: 1)")
    probe.add_argument(
        "--probe", choices=("ridge", "logistic"), default="ridge", help="kind (default: ridge)"
    )
    probe.add_argument("--out", metavar="FOLDER", help="where (default: the run's, with -probe)")
    probe.add_argument("--resume", action="store_true", help="go on where it was stopped")
    probe.set_defaults(verb=_probe)

    teacher = verbs.add_parser("teacher", help="train a teacher, or look into one")
    inner = teacher.add_subparsers(title="verbs", metavar="VERB", required=True)
    teach = inner.add_parser("train", help="train a diffusion model on unlabelled images")
    _add_recipe(teach)
    teach.set_defaults(verb=_teacher_train)
    extract = inner.add_parser(
        "extract", help="fill the feature cache (teacher.cache) of a recipe before it is trained"
    )
    extract.add_argument("recipe", metavar="RECIPE.yaml", help="the recipe")
    _add_overrides(extract)
    extract.set_defaults(verb=_teacher_extract)
    layers = inner.add_parser("layers", help="a teacher's layers: channels, reduction, cost")
    layers.add_argument("path", metavar="TEACHER", help="what a recipe gives as teacher.path")
    layers.add_argument(
        "--name", default="diffusers_unet", help="its teacher.name (default: diffusers_unet)"
    )
    layers.add_argument("--size", type=int, help="side of the images (default: its own)")
    layers.set_defaults(verb=_teacher_layers)

    policy = verbs.add_parser("policy", help="try a timestep policy without training a student")
    inner = policy.add_subparsers(title="verbs", metavar="VERB", required=True)
    fit = inner.add_parser(
        "fit", help="train a policy on a recorded table of rewards, and report its regret"
    )
    fit.add_argument(
        "--table", metavar="FILE", required=True, help="a table.safetensors of `distill probe`"
    )
    fit.add_argument("--policy", default="a2c", help="its policy.name (default: a2c)")
    fit.add_argument("--steps", type=int, default=300, help="steps of training (default: 300)")
    fit.add_argument("--batch", type=int, default=64, help="images a step (default: 64)")
    fit.add_argument(
        "--seed", type=int, nargs="+", default=[0], help="a training each (default: 0)"
    )
    fit.add_argument("--out", metavar="JSON", help="where the figures go (default: none)")
    fit.add_argument(
        "overrides",
        metavar="option=value",
        nargs="*",
        default=[],
        help="options of the policy, for instance learning_rate=1e-3",
    )
    fit.set_defaults(verb=_policy_fit)

    names = verbs.add_parser("list", help="the names that recipes may use")
    names.add_argument("table", nargs="?", choices=tuple(TABLES), help="one kind of them")
    names.set_defaults(verb=_list)
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="the recipe, or a run's config.yaml")
    _add_overrides(parser)
    parser.add_argument("--resume", action="store_true", help="go on where the run was stopped")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="resolve and check everything, try one batch, estimate the cost; train nothing",
    )


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        default=[],
        help="change the recipe, for instance train.steps=1000",
    )


def _train(options: argparse.Namespace) -> int:
    from distill.config import RunConfig
    from distill.recipe import load_config

    config = load_config(RunConfig, options.recipe, options.overrides)
    if options.dry_run:
        from distill.dry_run import dry_run

        print(dry_run(config))
        return 0
    from distill.report import report
    from distill.run import run

    summary = run(config, resume=options.resume)
    if summary:
        print(report(summary))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from distill.rescore import rescore

    print(rescore(options.student, options.overrides, head=options.head, out=options.out))
    return 0


def _export(options: argparse.Namespace) -> int:
    from distill.run import export_run

    print(export_run(options.run, options.arm, options.out))
    return 0


def _report(options: argparse.Namespace) -> int:
    from distill.report import compare

    print(compare(options.runs, options.out))
    return 0


def _bench(options: argparse.Namespace) -> int:
    from distill.bench import bench

    print(
        bench(
            batch=options.batch,
            rounds=options.rounds,
            layer=options.layer,
            teacher=options.teacher,
            compile=options.compile,
            out=options.out,
        )
    )
    return 0


def _probe(options: argparse.Namespace) -> int:
    from distill.config import RunConfig
    from distill.recipe import load_config
    from distill.survey import survey

    # Overrides that follow --layers; no layer has an equals sign in its name.
    late = [word for word in options.layers if "=" in word]
    print(
        survey(
            load_config(RunConfig, options.recipe, [*options.overrides, *late]),
            layers=[word for word in options.layers if "=" not in word],
            timesteps=options.timesteps,
            images=options.images,
            seeds=options.seeds,
            probe=options.probe,
            out=options.out,
            resume=options.resume,
        )
    )
    return 0


def _teacher_train(options: argparse.Namespace) -> int:
    from distill.config import TeacherTrainConfig
    from distill.recipe import load_config

    config = load_config(TeacherTrainConfig, options.recipe, options.overrides)
    if options.dry_run:
        from distill.dry_run import teacher_dry_run

        print(teacher_dry_run(config))
        return 0
    from distill.teach import train_teacher

    folder = train_teacher(config, resume=options.resume)
    print(
        f"teacher written to {folder / 'pipeline'}; use it with teacher.path={folder / 'pipeline'}"
    )
    return 0


def _teacher_extract(options: argparse.Namespace) -> int:
    from distill.config import RunConfig
    from distill.extract import extract
    from distill.recipe import load_config

    print(extract(load_config(RunConfig, options.recipe, options.overrides)))
    return 0


def _teacher_layers(options: argparse.Namespace) -> int:
    from distill.dry_run import teacher_layers

    print(teacher_layers(options.name, options.path, options.size))
    return 0


def _policy_fit(options: argparse.Namespace) -> int:
    from distill.policy_fit import fit

    print(
        fit(
            options.table,
            policy=options.policy,
            options=options.overrides,
            steps=options.steps,
            batch=options.batch,
            seeds=options.seed,
            out=options.out,
        )
    )
    return 0


def _list(options: argparse.Namespace) -> int:
    for table in [options.table] if options.table else TABLES:
        if options.table is None:
            print(f"{table}:")
        for name, target in TABLES[table].items():
            print(f"  {name:24} {target}")
    if options.table in (None, "students"):
        print("  (any timm model with feature maps; these are checked)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
