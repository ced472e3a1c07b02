// What kernels/tensorrt/plugins.cpp uses of TensorRT 10's header, so that a compiler can read that file and
// a test can ask it for shapes.  Written from the documentation; no replacement for a build against the SDK.
#pragma once

#include <cstddef>
#include <cstdint>

using cudaStream_t = struct CUstream_st*;

namespace nvinfer1 {

enum class DataType : int32_t {
  kFLOAT, kHALF, kINT8, kINT32, kBOOL, kUINT8, kFP8, kBF16, kINT64, kINT4
};
enum class TensorFormat : int32_t { kLINEAR, kCHW2 };
enum class PluginFieldType : int32_t {
  kFLOAT16, kFLOAT32, kFLOAT64, kINT8, kINT16, kINT32, kCHAR, kDIMS, kUNKNOWN, kBF16, kINT64
};
enum class PluginCapabilityType : int32_t { kCORE, kBUILD, kRUNTIME };
enum class TensorRTPhase : int32_t { kBUILD, kRUNTIME };

struct Dims {
  int32_t nbDims;
  int64_t d[8];
};
class IDimensionExpr;
struct DimsExprs {
  int32_t nbDims;
  const IDimensionExpr* d[8];
};
class IExprBuilder;
class IPluginResourceContext;
class ILoggerFinder;

struct PluginTensorDesc {
  Dims dims;
  DataType type;
  TensorFormat format;
  float scale;
};
struct DynamicPluginTensorDesc {
  PluginTensorDesc desc;
  Dims min, max, opt;
};
struct PluginField {
  const char* name;
  const void* data;
  PluginFieldType type;
  int32_t length;
  PluginField(const char* name = nullptr, const void* data = nullptr,
              PluginFieldType type = PluginFieldType::kUNKNOWN, int32_t length = 0)
      : name(name), data(data), type(type), length(length) {}
};
struct PluginFieldCollection {
  int32_t nbFields;
  const PluginField* fields;
};

class IVersionedInterface {
 public:
  virtual ~IVersionedInterface() noexcept = default;
};
class IPluginCapability : public IVersionedInterface {};
class IPluginCreatorInterface : public IVersionedInterface {};

class IPluginV3 : public IVersionedInterface {
 public:
  virtual IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept = 0;
  virtual IPluginV3* clone() noexcept = 0;
};
class IPluginV3OneCore : public IPluginCapability {
 public:
  virtual const char* getPluginName() const noexcept = 0;
  virtual const char* getPluginVersion() const noexcept = 0;
  virtual const char* getPluginNamespace() const noexcept = 0;
};
class IPluginV3OneBuild : public IPluginCapability {
 public:
  virtual int32_t configurePlugin(const DynamicPluginTensorDesc*, int32_t,
                                  const DynamicPluginTensorDesc*, int32_t) noexcept = 0;
  virtual int32_t getOutputDataTypes(DataType*, int32_t, const DataType*,
                                     int32_t) const noexcept = 0;
  virtual int32_t getOutputShapes(const DimsExprs*, int32_t, const DimsExprs*, int32_t, DimsExprs*,
                                  int32_t, IExprBuilder&) noexcept = 0;
  virtual bool supportsFormatCombination(int32_t, const DynamicPluginTensorDesc*, int32_t,
                                         int32_t) noexcept = 0;
  virtual int32_t getNbOutputs() const noexcept = 0;
  virtual size_t getWorkspaceSize(const DynamicPluginTensorDesc*, int32_t,
                                  const DynamicPluginTensorDesc*, int32_t) const noexcept {
    return 0;
  }
};
class IPluginV3OneRuntime : public IPluginCapability {
 public:
  virtual int32_t onShapeChange(const PluginTensorDesc*, int32_t, const PluginTensorDesc*,
                                int32_t) noexcept = 0;
  virtual int32_t enqueue(const PluginTensorDesc*, const PluginTensorDesc*, const void* const*,
                          void* const*, void*, cudaStream_t) noexcept = 0;
  virtual IPluginV3* attachToContext(IPluginResourceContext*) noexcept = 0;
  virtual const PluginFieldCollection* getFieldsToSerialize() noexcept = 0;
};
class IPluginCreatorV3One : public IPluginCreatorInterface {
 public:
  virtual IPluginV3* createPlugin(const char*, const PluginFieldCollection*,
                                  TensorRTPhase) noexcept = 0;
  virtual const PluginFieldCollection* getFieldNames() noexcept = 0;
  virtual const char* getPluginName() const noexcept = 0;
  virtual const char* getPluginVersion() const noexcept = 0;
  virtual const char* getPluginNamespace() const noexcept = 0;
};

}  // namespace nvinfer1
