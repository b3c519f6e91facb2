"""What the command line takes: every command with its options. What they do is in `cli`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from distill import package_version
from distill.errors import UserError
from distill.registry import TABLES

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction["_Parser"]

EXAMPLES = """examples:
  distill train experiments/quickstart.yaml
  distill train experiments/camvid.yaml data.root=DATA/camvid data.labelled=46 name=camvid46
  distill train runs/camvid46/config.yaml --resume
  distill evaluate runs/camvid46 data.root=DATA/camvid
  distill export runs/camvid46 --format onnx --precision int8 data.root=DATA/camvid
  distill predict runs/camvid46 MY_IMAGES --out predicted
  distill report runs/camvid46 data.root=DATA/camvid
  distill teacher train experiments/teachers/images.yaml data.root=MY_IMAGES
"""
SUBJECT = (
    "a run folder or an exported student; timm:NAME, timm:NAME:scratch or timm:NAME:WEIGHTS; "
    "teacher:PATH,layers=LAYER+LAYER,timestep=T,family=NAME; layers= for the others too"
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options and overrides in any order, which argparse alone refuses within a command."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options, rest = build_parser().parse_known_args(arguments)
    takes_overrides = hasattr(options, "overrides")
    for argument in rest:
        if not is_override(argument) or not takes_overrides:
            raise UserError(f"unrecognised argument {argument!r} (see distill --help)")
    if takes_overrides:
        for name, words in vars(options).items():
            if isinstance(words, list) and name != "overrides":  # argparse takes any word for more
                rest += [word for word in words if is_override(word)]
                words[:] = [word for word in words if not is_override(word)]
        found = {*options.overrides, *rest}
        options.overrides = [word for word in arguments if word in found]  # the last one counts
    return options


def is_override(word: str) -> bool:
    """Whether a word changes the recipe: `key.key=value`, and no file or folder of that name."""
    return bool(re.match(r"[A-Za-z_]\w*(\.\w+)*=", word)) and not os.path.exists(word)


def _image_size(word: str) -> tuple[int, int]:
    """Height and width in px, of `64` or `96x128`."""
    if not re.fullmatch(r"\d+(x\d+)?", word):
        raise argparse.ArgumentTypeError(f"must be a side or HEIGHTxWIDTH, got {word!r}")
    sides = [int(side) for side in word.split("x")]
    return sides[0], sides[-1]


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = _Parser(
        prog="distill",
        description="Distil a diffusion model into a small, fast, label-efficient vision backbone.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"distill {package_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    for add in (
        _train,
        _evaluate,
        _compare,
        _export,
        _predict,
        _demo,
        _report,
        _sweep,
        _bench,
        _probe,
        _teacher,
        _policy,
        _names,
    ):
        add(commands)
    return parser


def _train(commands: Commands) -> None:
    train = commands.add_parser("train", help="distil a teacher into a student, as a recipe says")
    _add_recipe(train)
    train.set_defaults(command="train")


def _evaluate(commands: Commands) -> None:
    evaluate = commands.add_parser(
        "evaluate", help="score a student, a timm model or a teacher on a benchmark"
    )
    evaluate.add_argument(
        "subject",
        metavar="SUBJECT",
        help=f"{SUBJECT}; with --protocol own also FILE.onnx or FILE.pt2",
    )
    _add_protocol(evaluate)
    evaluate.add_argument(
        "--out", metavar="JSON", help="where the scores go, with pictures beside (default: none)"
    )
    _add_overrides(evaluate)
    evaluate.set_defaults(command="evaluate")


def _compare(commands: Commands) -> None:
    compare = commands.add_parser(
        "compare", help="several subjects in one table: scores, size, speed, memory"
    )
    compare.add_argument(
        "words",
        metavar="RESULT.json|SUBJECT",
        nargs="+",
        help=f"what `distill evaluate --out` wrote, or a subject: {SUBJECT}",
    )
    _add_protocol(compare)
    compare.add_argument(
        "--out", metavar="FOLDER", help="for the table (Markdown, CSV, JSON) and a plot"
    )
    compare.add_argument("--batch", type=int, default=16, help="images a pass (default: 16)")
    compare.add_argument("--rounds", type=int, default=5, help="rounds, in turn (default: 5)")
    _add_overrides(compare)
    compare.set_defaults(command="compare")


def _export(commands: Commands) -> None:
    export = commands.add_parser(
        "export", help="write a run's student as timm, ONNX or another format"
    )
    export.add_argument("run", metavar="RUN", help="a run folder, or an exported student")
    export.add_argument("--arm", help="which arm of a run (default: distilled)")
    export.add_argument(
        "--format",
        choices=("timm", "hub", "onnx", "torchexport", "torchscript"),
        default="timm",
        help="timm's folder, the same with a model card, or a file (default: timm)",
    )
    export.add_argument(
        "--what",
        choices=("backbone", "segmenter", "classifier"),
        help="what a file gives (default: what the student was trained for)",
    )
    export.add_argument(
        "--precision",
        choices=("fp32", "fp16", "int8"),
        default="fp32",
        help="of a file; int8 is calibrated on train images (default: fp32)",
    )
    export.add_argument(
        "--out",
        metavar="PATH",
        help="where (default: RUN/student, or a file in RUN; of an exported student beside it)",
    )
    export.add_argument("--push", metavar="REPO_ID", help="with hub: upload it there")
    _add_overrides(export)
    export.set_defaults(command="export")


def _predict(commands: Commands) -> None:
    predict = commands.add_parser("predict", help="masks or classes of images, by any student")
    _add_model(predict)
    predict.add_argument("images", metavar="IMAGE", nargs="+", help="image files and folders")
    predict.add_argument("--out", metavar="DIR", required=True, help="where the results go")
    predict.add_argument("--force", action="store_true", help="replace results that are there")
    predict.set_defaults(command="predict")


def _demo(commands: Commands) -> None:
    demo = commands.add_parser("demo", help="a local web page: drop an image, see mask or class")
    _add_model(demo)
    demo.add_argument("--port", type=int, default=7860, help="of 127.0.0.1 (default: 7860)")
    demo.set_defaults(command="demo")


def _report(commands: Commands) -> None:
    report = commands.add_parser("report", help="finished runs as a table, and as a page to read")
    report.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="run folders, and data.KEY=value where their data lie elsewhere today",
    )
    report.add_argument(
        "--html",
        metavar="PAGE.html",
        help="the page, its pictures in a folder beside it (default: of a single run "
        "RUN/report.html, of several none)",
    )
    report.add_argument(
        "--probe", metavar="FOLDER", help="of `distill probe`: what the policy left to be gained"
    )
    report.add_argument("--out", metavar="JSON", help="where the figures go (default: none)")
    report.set_defaults(command="report", overrides=[])


def _sweep(commands: Commands) -> None:
    sweep = commands.add_parser(
        "sweep", help="train all runs of a study, going on where it was stopped, and compare them"
    )
    sweep.add_argument("study", metavar="STUDY.yaml", help="the study: a recipe, seeds and arms")
    _add_overrides(sweep)
    sweep.add_argument(
        "--only", metavar="ARM", nargs="+", default=[], help="train these arms alone (default: all)"
    )
    sweep.add_argument(
        "--seeds", metavar="SEED", nargs="+", default=[], help="train these seeds alone"
    )
    sweep.add_argument(
        "--out", metavar="FOLDER", help="where the results go (default: the folder of its runs)"
    )
    sweep.add_argument(
        "--keep",
        metavar="JSON",
        help="results of this study from elsewhere: take their scores over, train the rest",
    )
    sweep.add_argument(
        "--dry-run",
        action="store_true",
        help="check every arm with one batch, estimate the cost; train nothing",
    )
    sweep.set_defaults(command="sweep")


def _bench(commands: Commands) -> None:
    bench = commands.add_parser("bench", help="time a distillation step against the naive one")
    bench.add_argument(
        "recipe",
        metavar="RECIPE.yaml",
        nargs="?",
        help="whose step (default: a resnet18 and a UNet at 32 px, which the options below change)",
    )
    _add_overrides(bench)
    bench.add_argument(
        "--out", metavar="JSON", help="where the figures go, with a chart beside (default: none)"
    )
    bench.add_argument("--rounds", type=int, default=5, help="rounds, in turn (default: 5)")
    bench.add_argument("--batch", type=int, help="images a step (default: 64)")
    bench.add_argument("--layer", help="teacher layer (default: mid_block)")
    bench.add_argument(
        "--teacher", metavar="PATH", help="a UNet (default: CIFAR-10's DDPM, random weights)"
    )
    bench.add_argument("--compile", action="store_true", help="with torch.compile")
    bench.set_defaults(command="bench")


def _probe(commands: Commands) -> None:
    probe = commands.add_parser(
        "probe", help="map what a teacher's layers and timesteps know of the labels"
    )
    probe.add_argument("recipe", metavar="RECIPE.yaml", help="a recipe; its student plays no part")
    _add_overrides(probe)
    probe.add_argument(
        "--layers", metavar="LAYER", nargs="+", default=[], help="of the teacher (default: all)"
    )
    probe.add_argument("--timesteps", type=int, default=12, help="how many (default: 12)")
    probe.add_argument("--images", type=int, help="of train and of val at most (default: all)")
    probe.add_argument("--repeats", type=int, default=1, help="repetitions (default: 1)")
    probe.add_argument(
        "--probe", choices=("ridge", "logistic"), default="ridge", help="kind (default: ridge)"
    )
    probe.add_argument("--out", metavar="FOLDER", help="where (default: the run's, with -probe)")
    probe.add_argument("--resume", action="store_true", help="go on where it was stopped")
    probe.set_defaults(command="probe")


def _teacher(commands: Commands) -> None:
    teacher = commands.add_parser("teacher", help="train a teacher, or look into one")
    inner = teacher.add_subparsers(title="commands", metavar="COMMAND", required=True)
    teach = inner.add_parser("train", help="train a diffusion model on unlabelled images")
    _add_recipe(teach)
    teach.set_defaults(command="teacher_train")
    extract = inner.add_parser(
        "extract", help="fill the feature cache (teacher.cache) of a recipe before it is trained"
    )
    extract.add_argument("recipe", metavar="RECIPE.yaml", help="the recipe")
    _add_overrides(extract)
    extract.set_defaults(command="teacher_extract")
    layers = inner.add_parser("layers", help="a teacher's layers: channels, reduction, cost")
    layers.add_argument("path", metavar="TEACHER", help="what a recipe gives as teacher.path")
    layers.add_argument(
        "--name", default="diffusers_unet", help="its teacher.name (default: diffusers_unet)"
    )
    layers.add_argument(
        "--size",
        type=_image_size,
        metavar="SIDE|HEIGHTxWIDTH",
        help="of the images (default: the teacher's own)",
    )
    layers.add_argument(
        "overrides",
        metavar="option=value",
        nargs="*",
        default=[],
        help="its teacher.options, for instance heads=4",
    )
    layers.set_defaults(command="teacher_layers")


def _policy(commands: Commands) -> None:
    policy = commands.add_parser("policy", help="try a timestep policy without training a student")
    inner = policy.add_subparsers(title="commands", metavar="COMMAND", required=True)
    fit = inner.add_parser(
        "fit", help="train a policy on a recorded table of rewards, and report its regret"
    )
    fit.add_argument(
        "--table", metavar="FILE", required=True, help="a table.safetensors of `distill probe`"
    )
    fit.add_argument("--policy", default="a2c", help="its policy.name (default: a2c)")
    fit.add_argument("--steps", type=int, default=300, help="steps of training (default: 300)")
    fit.add_argument("--batch", type=int, default=64, help="images a step (default: 64)")
    fit.add_argument("--seeds", nargs="+", default=["0"], help="a training each (default: 0)")
    fit.add_argument(
        "--raw", action="store_true", help="rewards as they come, without each image's baseline"
    )
    fit.add_argument("--out", metavar="JSON", help="where the figures go (default: none)")
    fit.add_argument(
        "overrides",
        metavar="option=value",
        nargs="*",
        default=[],
        help="options of the policy, for instance learning_rate=1e-3",
    )
    fit.set_defaults(command="policy_fit")


def _names(commands: Commands) -> None:
    names = commands.add_parser("list", help="the names that recipes may use")
    names.add_argument(
        "table", metavar="KIND", nargs="?", choices=tuple(TABLES), help="one kind of them"
    )
    names.set_defaults(command="list")


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="the recipe, or a run's config.yaml")
    _add_overrides(parser)
    parser.add_argument("--resume", action="store_true", help="go on where the run was stopped")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="resolve and check everything, try one batch, estimate the cost; train nothing",
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a run folder, an exported student, .onnx, .pt2 or .ts"
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="open a TorchScript file (.ts, .pt), a program that may do anything",
    )


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        default=[],
        help="change the recipe, for instance train.steps=1000",
    )


def _add_protocol(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--protocol",
        choices=(
            *("own", "linear", "knn", "finetune", "label_efficient"),
            *("correspondence", "depth"),
        ),
        help="a student's own head; on frozen features a linear layer, nearest neighbours, a "
        "linear layer with few labels, keypoints found again, or depth; or the whole network "
        "(default: own)",
    )
    parser.add_argument("--benchmark", metavar="NAME", help="its data.benchmark")
