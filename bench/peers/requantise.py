"""Writes a GGUF file again with every matrix in one format, vectors as f32, and its metadata as it was:
python requantise.py IN OUT [Q8_0|Q4_0|Q4_1|BF16]."""

import sys
from pathlib import Path

import numpy
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, Keys, LlamaFileType
from gguf.quants import dequantize, quantize


def copy_metadata(reader: GGUFReader, writer: GGUFWriter, kind: GGMLQuantizationType):
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in (Keys.General.ARCHITECTURE, Keys.General.FILE_TYPE):
            continue  # the writer's own
        value_type = field.types[0]
        element = field.types[-1] if value_type == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), value_type, sub_type=element)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{kind.name}"])


def main(source: Path, target: Path, kind: GGMLQuantizationType):
    reader = GGUFReader(source)
    partial = target.with_suffix(".partial")
    writer = GGUFWriter(partial, reader.fields[Keys.General.ARCHITECTURE].contents())
    copy_metadata(reader, writer, kind)
    group, _ = GGML_QUANT_SIZES[kind]
    for tensor in reader.tensors:
        if tensor.tensor_type == kind:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=kind)
            continue
        values = numpy.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=numpy.float32)
        if values.ndim == 2 and values.shape[1] % group == 0:
            writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), GGMLQuantizationType[sys.argv[3] if len(sys.argv) > 3 else "Q8_0"])
