# Virtual environments for the jobs beside this file, which read it with `source`.

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

find_python() {  # the interpreter of a minor version, on the path or of pyenv
  local candidate
  for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python; do
    if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

environment() {  # environment INTERPRETER NAME: makes and activates a virtual environment
  "$1" -m venv "$scratch/$2"
  # shellcheck disable=SC1091
  source "$scratch/$2/bin/activate"
  python --version
}

install_peers() {  # what weights are compared with, a torch for CPUs is enough; and Hugging Face's data
  pip install -q "torch==2.13.0" numpy pillow pyyaml huggingface_hub safetensors h5py keras
  pip install -q "cykooz-resizer>=4" "simplejpeg>=1.9" "datasets>=3.0"
  pip install -q --no-deps "torchvision==0.28.0" timm
}

prepare_fashion_mnist() {  # real images, of which the tests make a data set
  if [ ! -d /usr/share/datasets/fashion-mnist ]; then
    apt-get install -y -q dataset-fashion-mnist
  fi
  export RESFLAX_DATA_DIR=$scratch/data
  python -m resflax.data prepare fashion_mnist --from /usr/share/datasets/fashion-mnist
}
