"""The packages of extras are imported at the moment they are needed."""

import subprocess
import sys


def test_importing_the_data_room_needs_none_of_them():
    code = "import ask_lightning.data, sys; assert not {'h5py', 'pyarrow', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
