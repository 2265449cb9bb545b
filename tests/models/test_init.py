"""The package of models imports without the packages that they are made of."""

import subprocess
import sys

ABSENT = """
import sys
import lightning, torchmetrics  # which import transformers where it is installed

outer = ("torchaudio", "transformers", "tokenizers", "soundfile")
for name in [name for name in sys.modules if name.startswith(outer)]:
    del sys.modules[name]
sys.modules.update(dict.fromkeys(outer))

import ask_lightning.models as models
models.TinyRetriever(), models.ResNet38(blocks=(1, 1, 1, 1)), models.CED(8, 1, 2)
try:
    models.ResNet38BERT(None, None)
except ImportError as error:
    print(error)
"""


def test_the_models_import_without_torchaudio_and_transformers():
    done = subprocess.run([sys.executable, "-c", ABSENT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 'pip install "ask-lightning[audio]"' in done.stdout
