"""The part of Triton's ``ModelConfig`` that is written here, for protobuf's own parser.

Triton's schema comes with ``tritonclient[grpc]``, which wants an older protobuf than ONNX; where it is
installed it is taken instead.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

KINDS = {"str": 9, "i32": 5, "i64": 3, "bool": 8}  # FieldDescriptorProto.Type
MESSAGES = {
    "ModelTensorReshape": "*shape:i64",
    "ModelInput": "name:str data_type:DataType *dims:i64 reshape:ModelTensorReshape",
    "ModelOutput": "name:str data_type:DataType *dims:i64 reshape:ModelTensorReshape label_filename:str",
    "ModelInstanceGroup": "count:i32 kind:Kind",
    "ModelDynamicBatching": "*preferred_batch_size:i32",
    "ModelParameter": "string_value:str",
    "ParametersEntry": "key:str value:ModelParameter",
    "ModelOperations": "*op_library_filename:str",
    "ModelConfig": "backend:str default_model_filename:str max_batch_size:i32 *input:ModelInput"
    " *output:ModelOutput *instance_group:ModelInstanceGroup dynamic_batching:ModelDynamicBatching"
    " *parameters:ParametersEntry model_operations:ModelOperations",
}
ENUMS = {
    "DataType": "INVALID BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 FP32 FP64 STRING BF16",
    "Kind": "AUTO GPU CPU MODEL",
}
PREFIX = {"DataType": "TYPE", "Kind": "KIND"}


def model_config() -> Any:
    """The message class."""
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError:
        return _written()
    return model_config_pb2.ModelConfig


def parameters(config: Any) -> dict[str, str]:
    """The parameters of a parsed configuration; Triton's own schema has them as a map."""
    found = config.parameters
    pairs = found.items() if hasattr(found, "items") else [(e.key, e.value) for e in found]
    return {key: value.string_value for key, value in pairs}


def _written() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name="written.proto", package="written", syntax="proto3"
    )
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values.split()):
            enum.value.add(name=f"{PREFIX[name]}_{value}", number=number)
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, field in enumerate(fields.split(), 1):
            title, _, kind = field.partition(":")
            made = message.field.add(name=title.lstrip("*"), number=number)
            made.label = 3 if title.startswith("*") else 1
            if kind in KINDS:
                made.type = KINDS[kind]
            else:
                made.type = 14 if kind in ENUMS else 11
                made.type_name = f".written.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("written.ModelConfig"))
