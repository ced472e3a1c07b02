// TensorRT plugins of all operators, for programs without Python: one class over a table.
//
// The library is loaded by IPluginRegistry::loadLibrary (trtexec --staticPlugins), which asks for
// getCreators.  Written against TensorRT 10; kernels/tensorrt_plugins.py is the same for Python.
#include <NvInfer.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "cuda/call.h"

namespace {

using namespace nvinfer1;

constexpr char NAMESPACE[] = "thresher", VERSION[] = "1";
constexpr char OUTPUTS[] = "plugin_outputs";  // how many a node has
constexpr char KEEP[] = "keep";               // the count, which is an input of shapes

// As in kernels/*/function.py.  Axes of outputs: `x0` is the first axis of x, `x2+` all from the third on.
struct Row {
  const char *name, *inputs, *outputs, *attributes;
};
constexpr Row TABLE[] = {
    {"BipartiteMerge", "x:T size:float metric:T keep:int64", "T x0 keep x2, float x0 keep, int64 x0 keep, int64 x0 x1", "protected:int"},
    {"RankedBipartiteMerge", "x:T size:float metric:T keep:int64", "T x0 keep x2, float x0 keep, int64 x0 keep, int64 x0 x1", "protected:int"},
    {"ClassAttention", "q:T k:T bias:float", "float k0 k2", "scale:float row:int"},
    {"KeepTokens", "x:T score:float keep:int64", "T x0 keep x2, int64 x0 keep, int64 x0 x1", "protected:int"},
    {"FuseTokens", "x:T score:float keep:int64", "T x0 keep x2, int64 x0 keep, int64 x0 x1", "protected:int"},
    {"PruneMerge", "x:T size:float score:float pruned:int64 keep:int64", "T x0 keep x2, float x0 keep, int64 x0 keep, int64 x0 x1", "protected:int"},
    {"GatherTokens", "x:T index:int64", "T x0 index1 x2+", ""},
    {"RestoreTokens", "x:T slot:int64 aside:T", "T aside0 aside1 aside2", ""},
    {"SelectDiverse", "x:T size:float keep:int64", "T x0 keep x2, int64 x0 keep, int64 x0 x1", "protected:int"},
    {"TokenEnergy", "metric:T size:float", "float metric0 metric2", "margin:float protected:int"},
    {"RedundantMerge", "x:T size:float metric:T score:float keep:int64", "T x0 keep x2, float x0 keep, int64 x0 keep, int64 x0 x1", "protected:int"},
    {"SplitMerge", "x:T size:float metric:T score:float keep:int64", "T x0 keep x2, float x0 keep, int64 x0 keep, int64 x0 x1", "protected:int"},
};

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> found;
  size_t start = 0;
  while (start < text.size()) {
    const size_t end = std::min(text.find(at, start), text.size());
    if (end > start) found.push_back(text.substr(start, end - start));
    start = end + 1;
  }
  return found;
}

// A row of the table, read once.
struct Operator {
  explicit Operator(const Row& row) : name(row.name) {
    for (const std::string& attribute : split(row.attributes, ' ')) {
      const std::vector<std::string> parts = split(attribute, ':');
      attributes.push_back(parts[0]);
      attribute_kinds.push_back(parts[1]);
    }
    for (const std::string& input : split(row.inputs, ' ')) {
      const std::vector<std::string> parts = split(input, ':');
      if (parts[0] == KEEP) continue;
      inputs.push_back(parts[0]);
      kinds.push_back(parts[1]);
    }
    for (const std::string& output : split(row.outputs, ',')) {
      std::vector<std::string> axes = split(output, ' ');
      output_kinds.push_back(axes[0]);
      axes.erase(axes.begin());
      shapes.push_back(axes);
    }
  }
  int input(const std::string& called) const {
    for (size_t i = 0; i < inputs.size(); ++i)
      if (inputs[i] == called) return static_cast<int>(i);
    return -1;
  }

  std::string name;
  std::vector<std::string> inputs, kinds;  // of all but keep
  std::vector<std::string> output_kinds;
  std::vector<std::vector<std::string>> shapes;
  std::vector<std::string> attributes, attribute_kinds;
};

int64_t element_of(DataType type) {
  switch (type) {
    case DataType::kFLOAT: return 1;
    case DataType::kUINT8: return 2;
    case DataType::kINT8: return 3;
    case DataType::kINT32: return 6;
    case DataType::kINT64: return 7;
    case DataType::kBOOL: return 9;
    case DataType::kHALF: return 10;
    case DataType::kBF16: return 16;
    default: return 0;
  }
}

ThresherTensor tensor(const Dims& dims, DataType type, const void* data) {
  ThresherTensor made = {const_cast<void*>(data), element_of(type), dims.nbDims, {}};
  for (int i = 0; i < dims.nbDims; ++i) made.dims[i] = dims.d[i];
  return made;
}

using Values = std::map<std::string, double>;  // attributes, and how many outputs there are

// Named numbers as TensorRT wants them; the fields point into the object.
class Fields {
 public:
  Fields(const Operator& of, const Values& values) {
    names_ = of.attributes;
    names_.push_back(OUTPUTS);
    wholes_.reserve(names_.size());
    numbers_.reserve(names_.size());
    for (size_t i = 0; i < names_.size(); ++i) {
      const std::string& name = names_[i];
      const double value = values.at(name);
      if (i < of.attributes.size() && of.attribute_kinds[i] == "float") {
        numbers_.push_back(static_cast<float>(value));
        fields_.emplace_back(name.c_str(), &numbers_.back(), PluginFieldType::kFLOAT32, 1);
      } else {
        wholes_.push_back(static_cast<int32_t>(value));
        fields_.emplace_back(name.c_str(), &wholes_.back(), PluginFieldType::kINT32, 1);
      }
    }
    all_.nbFields = static_cast<int32_t>(fields_.size());
    all_.fields = fields_.data();
  }
  Fields(const Fields&) = delete;
  const PluginFieldCollection* get() const { return &all_; }

 private:
  std::vector<std::string> names_;
  std::vector<int32_t> wholes_;
  std::vector<float> numbers_;
  std::vector<PluginField> fields_;
  PluginFieldCollection all_ = {};
};

class Plugin : public IPluginV3,
               public IPluginV3OneCore,
               public IPluginV3OneBuild,
               public IPluginV3OneRuntime {
 public:
  Plugin(const Operator& of, const Values& values) : of_(of), values_(values), fields_(of, values) {}

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
      case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
      case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
    }
    return nullptr;
  }
  IPluginV3* clone() noexcept override { return new Plugin(of_, values_); }

  const char* getPluginName() const noexcept override { return of_.name.c_str(); }
  const char* getPluginVersion() const noexcept override { return VERSION; }
  const char* getPluginNamespace() const noexcept override { return NAMESPACE; }

  int32_t getNbOutputs() const noexcept override {
    return static_cast<int32_t>(values_.at(OUTPUTS));
  }
  int32_t getOutputDataTypes(DataType* types, int32_t count, const DataType* given,
                             int32_t) const noexcept override {
    for (int i = 0; i < count; ++i) types[i] = type_of(of_.output_kinds[i], given[0]);
    return 0;
  }
  int32_t getOutputShapes(const DimsExprs* inputs, int32_t, const DimsExprs* shape_inputs,
                          int32_t shape_count, DimsExprs* outputs, int32_t count,
                          IExprBuilder&) noexcept override {
    for (int i = 0; i < count; ++i) {
      int32_t rank = 0;
      for (const std::string& axis : of_.shapes[i]) {
        if (axis == KEEP) {
          if (shape_count != 1 || shape_inputs[0].nbDims != 1) return -1;
          outputs[i].d[rank++] = shape_inputs[0].d[0];
          continue;
        }
        const size_t digit = axis.find_first_of("0123456789");
        const DimsExprs& from = inputs[of_.input(axis.substr(0, digit))];
        const int first = axis[digit] - '0';
        const int last = axis.back() == '+' ? from.nbDims : first + 1;
        if (last > from.nbDims) return -1;
        for (int at = first; at < last; ++at) outputs[i].d[rank++] = from.d[at];
      }
      outputs[i].nbDims = rank;
    }
    return 0;
  }
  bool supportsFormatCombination(int32_t at, const DynamicPluginTensorDesc* given, int32_t inputs,
                                 int32_t) noexcept override {
    if (given[at].desc.format != TensorFormat::kLINEAR) return false;
    const int tensors = static_cast<int>(of_.inputs.size());
    if (at >= tensors && at < inputs) return given[at].desc.type == DataType::kINT64;  // keep
    const std::string& kind = at < tensors ? of_.kinds[at] : of_.output_kinds[at - inputs];
    if (kind != "T") return given[at].desc.type == type_of(kind, DataType::kFLOAT);
    const DataType type = given[at].desc.type;
    const bool number =
        type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
    return type == given[0].desc.type && (number || (of_.name == "GatherTokens" && element_of(type)));
  }
  int32_t configurePlugin(const DynamicPluginTensorDesc*, int32_t, const DynamicPluginTensorDesc*,
                          int32_t) noexcept override {
    return 0;
  }
  size_t getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t,
                          const DynamicPluginTensorDesc* outputs,
                          int32_t count) const noexcept override {
    ThresherCall call = numbers();
    for (size_t i = 0; i < of_.inputs.size(); ++i)
      call.inputs[i] = tensor(inputs[i].max, inputs[i].desc.type, nullptr);
    for (int i = 0; i < count; ++i)
      call.outputs[i] = tensor(outputs[i].max, outputs[i].desc.type, nullptr);
    int64_t bytes = 0;
    thresher_cuda_workspace(of_.name.c_str(), &call, &bytes);
    return static_cast<size_t>(bytes);
  }

  int32_t onShapeChange(const PluginTensorDesc*, int32_t, const PluginTensorDesc*,
                        int32_t) noexcept override {
    return 0;
  }
  int32_t enqueue(const PluginTensorDesc* inputs, const PluginTensorDesc* outputs,
                  const void* const* read, void* const* written, void* workspace,
                  cudaStream_t stream) noexcept override {
    ThresherCall call = numbers();
    for (size_t i = 0; i < of_.inputs.size(); ++i)
      call.inputs[i] = tensor(inputs[i].dims, inputs[i].type, read[i]);
    for (int i = 0; i < getNbOutputs(); ++i)
      call.outputs[i] = tensor(outputs[i].dims, outputs[i].type, written[i]);
    call.keep = call.outputs[0].dims[1];
    call.stream = stream;
    call.workspace = workspace;
    const int status =
        thresher_cuda_workspace(of_.name.c_str(), &call, &call.workspace_bytes);
    return status ? status : thresher_cuda_launch(of_.name.c_str(), &call);
  }
  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }
  const PluginFieldCollection* getFieldsToSerialize() noexcept override { return fields_.get(); }

 private:
  static DataType type_of(const std::string& kind, DataType tokens) {
    return kind == "float" ? DataType::kFLOAT : kind == "int64" ? DataType::kINT64 : tokens;
  }
  double value(const char* name) const {
    const auto found = values_.find(name);
    return found == values_.end() ? 0 : found->second;
  }
  ThresherCall numbers() const {
    ThresherCall call = {};
    call.protect = static_cast<int64_t>(value("protected"));
    call.row = static_cast<int64_t>(value("row"));
    call.scale = value("scale");
    call.margin = value("margin");
    return call;
  }

  const Operator& of_;
  const Values values_;
  Fields fields_;
};

class Creator : public IPluginCreatorV3One {
 public:
  explicit Creator(const Row& row) : of_(row), fields_(of_, usual()) {}

  const char* getPluginName() const noexcept override { return of_.name.c_str(); }
  const char* getPluginVersion() const noexcept override { return VERSION; }
  const char* getPluginNamespace() const noexcept override { return NAMESPACE; }
  const PluginFieldCollection* getFieldNames() noexcept override { return fields_.get(); }

  IPluginV3* createPlugin(const char*, const PluginFieldCollection* given,
                          TensorRTPhase) noexcept override {
    Values values = usual();
    for (int i = 0; i < given->nbFields; ++i) {
      const PluginField& field = given->fields[i];
      const auto found = values.find(field.name);
      if (found == values.end() || !field.data || field.length < 1) continue;
      switch (field.type) {
        case PluginFieldType::kINT32: found->second = *static_cast<const int32_t*>(field.data); break;
        case PluginFieldType::kINT64:
          found->second = static_cast<double>(*static_cast<const int64_t*>(field.data));
          break;
        case PluginFieldType::kFLOAT32: found->second = *static_cast<const float*>(field.data); break;
        default: return nullptr;
      }
    }
    const double outputs = values.at(OUTPUTS);
    if (!(outputs >= 1 && outputs <= static_cast<double>(of_.shapes.size()))) return nullptr;
    return new Plugin(of_, values);
  }

 private:
  Values usual() const {
    Values values;
    for (const std::string& name : of_.attributes) values[name] = 0;
    values[OUTPUTS] = static_cast<double>(of_.shapes.size());
    return values;
  }

  const Operator of_;
  Fields fields_;
};

}  // namespace

#define THRESHER_EXPORT extern "C" __attribute__((visibility("default")))

// What IPluginRegistry::loadLibrary asks for; the creators live as long as the library.
THRESHER_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static std::vector<Creator*> held;
  static std::vector<nvinfer1::IPluginCreatorInterface*> creators;
  if (creators.empty())
    for (const Row& row : TABLE) {
      held.push_back(new Creator(row));
      creators.push_back(held.back());
    }
  count = static_cast<int32_t>(creators.size());
  return creators.data();
}

THRESHER_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder*) {}
