"""What a person types, and what comes back."""

import os
import shutil
import signal
import subprocess
import sys
import zipfile

import pytest

import mae_jax
from mae_jax import UserError, cli, results
from mae_jax.config import image_size
from tests.program import ROOT, command, environment, hear_ctrl_c

QUICKSTART = f"--config={ROOT / 'configs/quickstart.py'}"


def refused(capsys, *argv):
    """The one line a command ends with."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in argv])
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def python(*arguments, cwd=ROOT, **variables):
    """A fresh interpreter that finds this checkout from any directory."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**environment(), "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
        preexec_fn=hear_ctrl_c,
    )


def parse(*argv):
    return cli.parse_recipe(cli.Parser("train", ""), [QUICKSTART, *argv]).config


def test_the_program_lists_its_commands_and_tells_its_version(capsys):
    cli.main([])
    listed = capsys.readouterr().out
    assert all(f"\n  {command} " in listed for command in cli.COMMANDS)
    cli.main(["--version"])
    assert capsys.readouterr().out == f"mae_jax {mae_jax.__version__}\n"


def test_one_version_everywhere():
    version = mae_jax.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    newest = next(x for x in lines if x[:3] == "## " and x != "## Unreleased")
    assert newest == f"## {version}"


@pytest.mark.parametrize("command", cli.COMMANDS)
@pytest.mark.parametrize("option", ["-h", "--version"])
def test_every_command_has_help_and_version(command, option, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, option])
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert f"usage: mae-jax {command}" in told or told == f"mae_jax {mae_jax.__version__}\n"


@pytest.mark.parametrize("module", ["mae_jax", "mae_jax.distributed.plan", "mae_jax.bench"])
def test_spellings_by_module(module):
    done = python("-m", module, "-h")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: mae-jax ")


def test_importing_the_package_imports_no_jax_and_two_commands_do_not_clash():
    light = "import sys, mae_jax.cli; assert not {'jax', 'numpy'} & set(sys.modules)"
    done = python("-c", f"{light}; import mae_jax.main, mae_jax.plan")
    assert done.returncode == 0, done.stderr


FIELDS = [
    ("model.depth", "-1"),
    ("optim.clip_norm", "-1"),
    ("optim.weight_decay", "-5"),
    ("optim.b1", "1.5"),
    ("optim.eps", "-1"),
    ("optim.warmup_steps", "-5"),
    ("data.std", "0"),
    ("data.std", "0.2,0,0.2"),
    ("seed", "-1"),
    ("model.image_size", "abc"),
    ("model.heads", "-1"),
    ("decoder.heads", "0"),
    ("decoder.width", "0"),
    ("data.scale", "0.5"),
    ("mesh.fsdp", "0"),
    ("steps", "abc"),
    ("steps", "1.5"),
    ("data.flip", "maybe"),
    ("optim.base_lr", "nan"),
    ("mask.ratio", "1"),
]


@pytest.mark.parametrize(("field", "value"), FIELDS)
def test_a_bad_value_is_refused_by_the_name_of_its_field(field, value, tmp_path, capsys):
    workdir = tmp_path / "run"
    override = f"--config.{field}={value}"
    told = refused(capsys, "train", QUICKSTART, f"--workdir={workdir}", override)
    assert told.startswith(f"{field} = ")
    assert not workdir.exists()


@pytest.mark.parametrize("command", [["train", "--workdir=x"], ["plan"], ["bench", "step"]])
def test_an_unknown_field_is_refused_by_every_command_with_what_was_meant(command, capsys):
    told = refused(capsys, *command, QUICKSTART, "--config.mask.ratoi=0.5")
    assert told.startswith("unknown config field mask.ratoi; did you mean mask.ratio")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def get_config(:\n", "line 1: SyntaxError: invalid syntax"),
        ("x = 1\n", "has no function get_config"),
        ("def get_config():\n    return 3\n", "has to return a changed default_config()"),
        (
            "from mae_jax.config import default_config\n\n\ndef get_config():\n"
            "    config = default_config()\n    config.data.scale = 0.5\n    return config\n",
            "line 6: TypeError: Could not override field",
        ),
        (
            "from mae_jax.config import default_config\n\n\ndef get_config():\n"
            "    config = default_config()\n    config.mask_ratio = 0.5\n    return config\n",
            "line 6: AttributeError: ",
        ),
        ("import nosuchmodule\n", "line 1: ModuleNotFoundError: No module named 'nosuchmodule'"),
    ],
)
def test_a_broken_config_file_is_refused_with_its_line(content, message, tmp_path, capsys):
    file = tmp_path / "recipe.py"
    file.write_text(content)
    told = refused(capsys, "train", f"--config={file}", "--workdir=x")
    assert str(file) in told
    assert message in told


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nosuch"], "no command nosuch: choose one of train, "),
        (["train", "--workdir=x"], "--config"),
        (["train", QUICKSTART], "--workdir"),
        (["train", QUICKSTART, "--workdir=x", "--config.steps"], "steps = ''"),
        (["train", QUICKSTART, "--workdir=x", "--nonsense=3"], "--nonsense=3"),
        (["train", "--config=nowhere.py", "--workdir=x"], "no such file, and no recipe of that"),
        (["train", "--config=pretrain:vit_xxl", "--workdir=x"], "choose vit_b, vit_l, vit_h"),
        (["bench", "nothing", QUICKSTART], "invalid choice: 'nothing'"),
        (["export", "--from=/nowhere", "--format=x", "--output=y"], "invalid choice: 'x'"),
        (["export", "--from=/nowhere", "--format=timm", "--output=/nowhere/y"], "/nowhere: there"),
        (["visualize", "--weights=w", "--images", "a", "--output=a.jpg"], ".png"),
        (
            ["visualize", "--weights=w", "--images", "a", "--output=a.png", "--mask_ratio=abc"],
            "invalid numbers value: 'abc'",
        ),
        (
            ["features", "--weights=w", "--images=i", "--output=o", "--image_size=1,2,3"],
            "invalid image_size value: '1,2,3'",
        ),
        (["evaluate", "--weights=w"], "w: is no workdir of a run"),
    ],
)
def test_other_bad_input_is_one_line(argv, message, capsys):
    assert message in refused(capsys, *argv)


def test_an_unknown_topology_is_one_line(capsys):
    pytest.importorskip("libtpu", reason="needs the TPU compiler")
    told = refused(capsys, "plan", QUICKSTART, "--topology=v9:1x1")
    assert told.startswith("'v9:1x1' names no TPU: ")


def test_a_fault_of_the_program_is_not_hidden(monkeypatch):
    def fault(argv):
        raise ValueError("ours")

    monkeypatch.setattr(results, "main", fault)
    with pytest.raises(ValueError, match="ours"):
        cli.main(["results", "x"])


def test_a_message_of_several_lines_is_told_in_one(monkeypatch, capsys):
    def refuse(argv):
        raise UserError("two things:\n  one\n  another")

    monkeypatch.setattr(results, "main", refuse)
    assert refused(capsys, "results", "x") == "two things: one another"


def test_ctrl_c_while_importing_is_one_line(tmp_path):
    (tmp_path / "jax.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    for spelling in (["mae_jax", "train"], ["mae_jax.main"]):
        done = python("-m", *spelling, QUICKSTART, "--workdir=x", PYTHONPATH=path)
        assert (done.returncode, done.stderr) == (130, "stopped by Ctrl-C\n")


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "stopped by Ctrl-C\n"),
        (signal.SIGTERM, 42, "told to stop where there is nothing to lose: start it again\n"),
    ],
)
def test_a_signal_while_compiling_is_one_line_at_once(tmp_path, number, code, line):
    process = subprocess.Popen(
        command(tmp_path / "run"),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=hear_ctrl_c,
    )
    assert any("compiling the step" in told for told in process.stderr)
    process.send_signal(number)
    assert process.stderr.read() == line
    assert process.wait() == code
    assert not (tmp_path / "run" / "claim.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_a_program_starts_again_with_huge_pages_unless_their_setting_is_given(
    tmp_path, monkeypatch
):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    log = tmp_path / "starts"
    note = f"open({str(log)!r}, 'a').write(f'{{os.getpid()}} {{os.environ.get(name)}}\\n')"
    (tmp_path / "sitecustomize.py").write_text(f"import os; name = 'GLIBC_TUNABLES'; {note}")

    def starts(**variables):
        log.unlink(missing_ok=True)
        path = os.pathsep.join((str(tmp_path), str(ROOT)))
        done = python(
            "-X", "utf8", "-m", "mae_jax.results", "--version", PYTHONPATH=path, **variables
        )
        assert done.stdout == f"mae_jax {mae_jax.__version__}\n"
        return [line.split() for line in log.read_text().splitlines()]

    (first, without), (again, setting) = starts()
    assert first == again
    assert (without, setting) == ("None", "glibc.malloc.hugetlb=1")
    assert len(starts(GLIBC_TUNABLES="")) == 1


def test_recipes_are_found_by_path_or_by_name_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "quickstart.py", "configs/quickstart.py"):
        assert cli.parse_recipe(cli.Parser("train", ""), [f"--config={name}"]).config.steps == 400
    probe = cli.parse_recipe(cli.Parser("train", ""), ["--config", "quickstart:linear_probe"])
    assert probe.config.task == "linear_probe"
    partial = cli.parse_recipe(cli.Parser("train", ""), ["--config=partial"]).config
    assert partial.trainable_blocks == 1  # of a recipe that loads another
    (tmp_path / "configs").mkdir()
    own = "from mae_jax.config import default_config as get_config\n"
    (tmp_path / "configs" / "quickstart.py").write_text(own)  # what is typed comes first
    named = cli.parse_recipe(cli.Parser("train", ""), ["--config=configs/quickstart.py"]).config
    assert named.steps == 0


def test_overrides_may_be_spelled_as_absl_took_them():
    assert parse("--config.steps=5").steps == 5
    assert parse("--config.steps", "5").steps == 5
    assert parse("--config.data.flip=false").data.flip is False
    assert parse("--noconfig.data.flip").data.flip is False
    assert parse("--noconfig.data.flip", "--config.data.flip").data.flip is True
    assert parse("--config.optim.base_lr=1e-3").optim.base_lr == 1e-3
    assert parse("--config.mesh.data=-1", "--config.mesh.fsdp", "-1").mesh.fsdp == -1


def test_a_tuple_given_twice_is_the_last_one():
    config = parse("--config.model.image_size=16", "--config.model.image_size=32")
    assert image_size(config) == (32, 32)


@pytest.mark.parametrize(
    ("variables", "devices", "platforms"),
    [
        ({}, [], "cpu"),
        ({}, ["/dev/accel0"], None),
        ({}, ["/dev/vfio/0"], None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, [], None),
        ({"JAX_FORCE_TPU_INIT": "1"}, [], None),
        ({"JAX_PLATFORMS": "tpu"}, [], "tpu"),
    ],
)
def test_a_tpu_is_looked_for_where_there_may_be_one(variables, devices, platforms, monkeypatch):
    environ = {"PATH": "", **variables}
    monkeypatch.setattr(os, "environ", environ)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(cli.importlib.metadata, "entry_points", lambda group: ())
    monkeypatch.setattr(cli.glob, "glob", lambda p: [d for d in devices if d[:8] == p[:8]])
    cli._skip_absent_tpu()
    assert environ.get("JAX_PLATFORMS") == platforms


def test_a_machine_with_the_tpu_compiler_and_no_tpu_hears_nothing_of_it():
    pytest.importorskip("libtpu", reason="needs the TPU compiler")
    code = (
        "import os; del os.environ['JAX_PLATFORMS']\n"
        "for name in [x for x in os.environ if x.startswith('TPU_')]: del os.environ[name]\n"
        "from mae_jax import cli; cli._skip_absent_tpu()\n"
        "import jax; print(jax.devices()[0].platform)"
    )
    done = python("-c", code)
    assert (done.stdout, done.stderr) == ("cpu\n", "")


def local(*arguments):
    return python(ROOT / "launch" / "local.py", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes=0", "--", "echo"], "--processes and --devices: at least 1"),
        (["--devices=0", "--", "echo"], "--processes and --devices: at least 1"),
        (["--", "nosuchcommand"], "nosuchcommand: no such command"),
    ],
)
def test_the_local_launcher_refuses_in_one_line(arguments, message):
    done = local(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}\n")


@pytest.mark.slow
def test_a_wheel_carries_the_recipes(tmp_path):
    pytest.importorskip("setuptools", reason="builds a wheel")
    source, empty, site = tmp_path / "source", tmp_path / "empty", tmp_path / "site"
    empty.mkdir()
    for name in ("mae_jax", "configs"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    done = python("setup.py", "-q", "bdist_wheel", "-d", tmp_path, cwd=source)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    assert (site / "mae_jax" / "py.typed").exists()
    assert "mae-jax = mae_jax.cli:main" in next(site.glob("*/entry_points.txt")).read_text()
    for recipe in ("quickstart", "configs/quickstart.py", "partial:vit_b"):
        argv = ["-m", "mae_jax", "bench", "step", f"--config={recipe}", "--config.batch_size=0"]
        done = python(*argv, cwd=empty, PYTHONPATH=str(site))
        assert done.stderr.startswith("error: batch_size = 0")
