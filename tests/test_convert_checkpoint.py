"""tools/convert_checkpoint.py as a user types it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hf_models import save_llava, save_llm, save_siglip, save_vila
from programs import ROOT, environment, load_script, start

TOOL = ROOT / "tools" / "convert_checkpoint.py"


@pytest.mark.parametrize("command", ["", "import", "export", "verify", "inspect"])
def test_help_shows_a_worked_example(command, capsys):
    with pytest.raises(SystemExit) as left:
        load_script(TOOL).main([*filter(None, [command]), "--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0 and f"python tools/convert_checkpoint.py {command}".rstrip() in text and "Exit status" in text


def test_there_and_back(tmp_path, capsys):
    """The import as a process of its own, as it joins a job of one rank; the rest in this one."""
    save_vila(tmp_path / "vila")
    code, text = start(sys.executable, TOOL, "import", tmp_path / "vila", tmp_path / "checkpoint")
    assert code == 0 and "57 tensors of the model, 29 that travel along" in text and f"wrote {tmp_path / 'checkpoint'}" in text
    assert "import: 100%" in text and "B/s" in text  # rate and ETA
    main = load_script(TOOL).main
    assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "out"), "--format", "vila", "--shard-size", "50KB"]) == 0
    assert len(list((tmp_path / "out" / "llm").glob("*.safetensors"))) > 2
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "vila"), str(tmp_path / "out")]) == 0
    assert "no differences" in capsys.readouterr().out


@pytest.mark.parametrize("tool", ["convert", "merge"])
def test_what_stands_in_a_job_is_still_one_process(tmp_path, tool):
    """A cluster that starts containers with RANK and WORLD_SIZE means its training: nobody else comes to meet this process."""
    (tmp_path / "empty").mkdir()
    merge = [ROOT / "tools/merge_lora.py", "--checkpoint", tmp_path / "empty", "--output", tmp_path / "out"]
    words = [TOOL, "verify", tmp_path / "empty", tmp_path / "empty"] if tool == "convert" else merge
    job = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run([sys.executable, *words], env=environment() | job, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {tmp_path / 'empty'} "), done.stderr


def test_dry_runs_write_nothing(tmp_path, capsys):
    main = load_script(TOOL).main
    save_llm(tmp_path / "llm")
    save_siglip(tmp_path / "siglip")
    words = ["import", str(tmp_path / "llm"), str(tmp_path / "out"), "--dry-run", "--projector", "mlp2x_gelu"]
    assert main([*words, "--vision-tower", str(tmp_path / "siglip")]) == 0
    assert "parts layout" in (text := capsys.readouterr()).out and "everything fits; would write" in text.out
    assert "the projector is freshly initialised" in text.err and not (tmp_path / "out").exists()


@pytest.mark.end_to_end
@pytest.mark.parametrize("what", ["import", "export"])
def test_a_disk_that_fills_up_meanwhile_is_one_error_and_leaves_nothing(tmp_path, what):
    """A limit on the size of files stands for the disk."""
    save_vila(tmp_path / "vila")
    words = ["import", tmp_path / "vila", tmp_path / "checkpoint"]
    if what == "export":
        assert start(sys.executable, TOOL, *words)[0] == 0
        words = ["export", tmp_path / "checkpoint", tmp_path / "out", "--format", "vila"]
    before = sorted(tmp_path.iterdir())
    limited = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({100 << 10},) * 2); "
    limited += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    code, text = start(sys.executable, "-c", limited, TOOL, *words)
    assert code == 1 and "error: File too large: " in text and "Traceback" not in text, text
    assert sorted(tmp_path.iterdir()) == before


def test_errors_have_one_line_and_code_1(tmp_path, capsys):
    main = load_script(TOOL).main
    save_llava(tmp_path / "llava")
    (tmp_path / "llava" / "model.safetensors").write_bytes(b"short")
    capsys.readouterr()
    assert main(["import", str(tmp_path / "llava"), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'llava' / 'model.safetensors'} is cut short")
    assert main(["export", str(tmp_path / "llava"), str(tmp_path / "out"), "--format", "llm"]) == 1
    assert "complete.json, so its writing did not end" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "llava"), str(tmp_path / "out"), "--format", "peft", "--merge-lora"]) == 1
    assert "choose one of the two" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "llava"), str(tmp_path / "out"), "--format", "peft", "--shard-size", "1GB"]) == 1
    assert "--shard_size says nothing about adapters alone" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["export", "a", "b", "--format", "llm", "--shard-size", "huge"])
    assert left.value.code == 2 and "is no size; write 5GB" in capsys.readouterr().err
