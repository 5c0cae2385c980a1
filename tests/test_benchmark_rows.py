"""What a benchmark's run was: the commit of the code, and whether the code was that commit's."""

import shutil
import subprocess

from programs import ROOT, load_script


def test_the_commit_and_changes_to_it(tmp_path):
    (tmp_path / "tools" / "benchmark_results").mkdir(parents=True)
    copy = shutil.copy(ROOT / "tools" / "benchmark_rows.py", tmp_path / "tools")
    tool = load_script(tmp_path / "tools" / "benchmark_rows.py")
    assert tool.code_commit() is None

    def git(*words: str) -> str:
        words = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words]
        return subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "code")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "tools" / "benchmark_results" / "rows.json").write_text("[]")
    assert tool.code_commit() == commit
    with open(copy, "a") as file:
        file.write("# changed\n")
    changed = tool.code_commit()
    assert changed.startswith(f"{commit} and changes ")
    (tmp_path / "tools" / "new.py").write_text("# new\n")
    assert tool.code_commit() not in (changed, commit)
