#!/bin/sh
# The packages of zoo.py into a folder of their own, without dependencies: torch is not touched.
# usage: benchmarks/install_zoo.sh FOLDER
set -u
here=$(dirname "$0")
while read -r package; do
    python -m pip install --quiet --no-deps --target "$1" "$package" || echo "not to be had: $package"
done < "$here/zoo_packages.txt"
# parts that were compiled for another torch; the Python sources do without
rm -rf "$1"/torchaudio/lib "$1"/torchvision/*.so
