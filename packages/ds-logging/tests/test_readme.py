import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_code_of_the_readme_runs(run_script):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 4
    done = run_script("\n".join(blocks))
    assert "[Rank 0] starting" in done.stderr
    assert done.stdout == ""
