"""Writes a GGUF file again with every matrix as Q8_0, vectors as f32, and its metadata as it was: python requantise.py IN OUT."""

import sys
from pathlib import Path

import numpy
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, Keys, LlamaFileType
from gguf.quants import dequantize, quantize

Q8_0_GROUP = 32


def copy_metadata(reader: GGUFReader, writer: GGUFWriter):
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in (Keys.General.ARCHITECTURE, Keys.General.FILE_TYPE):
            continue  # the writer's own
        kind = field.types[0]
        element = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=element)
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)


def main(source: Path, target: Path):
    reader = GGUFReader(source)
    partial = target.with_suffix(".partial")
    writer = GGUFWriter(partial, reader.fields[Keys.General.ARCHITECTURE].contents())
    copy_metadata(reader, writer)
    for tensor in reader.tensors:
        if tensor.tensor_type == GGMLQuantizationType.Q8_0:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=GGMLQuantizationType.Q8_0)
            continue
        values = numpy.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=numpy.float32)
        if values.ndim == 2 and values.shape[1] % Q8_0_GROUP == 0:
            writer.add_tensor(tensor.name, quantize(values, GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
