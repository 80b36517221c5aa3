#!/bin/sh
# The packages of zoo.py into a folder of their own, without dependencies: torch is not touched.
# usage: benchmarks/install_zoo.sh FOLDER
set -u
list=$(dirname "$0")/zoo_packages.txt
install() { python -m pip install --quiet --no-deps --target "$1" $2; }
# all at once, which takes a tenth of the time; one by one if that fails, to leave out what is not to be had
install "$1" "-r $list" || while read -r package; do
    install "$1" "$package" || echo "not to be had: $package"
done < "$list"
# parts that were compiled for another torch; the Python sources do without
rm -rf "$1"/torchaudio/lib "$1"/torchvision/*.so
