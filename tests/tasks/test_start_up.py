"""What a run loads before it knows whether anything is to be done."""

import subprocess
import sys

NOT_NEEDED = ("transformers.modeling_utils", "datasets", "matplotlib", "mlflow", "prefect", "dvc", "lm_eval")
"""One to four seconds each, and nothing for a run whose stages are cached; MLflow and Prefect come when they are used."""


def test_the_plain_loop_loads_no_library_that_only_stages_need():
    code = f"import sys, flows.commands.running, flows.without_prefect; print([n for n in {NOT_NEEDED} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_audit_begins_to_hash_before_any_library_of_weights_is_there():
    code = "import sys, flows.commands.auditing; print([n for n in ('torch', 'mlflow', 'dvc') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
