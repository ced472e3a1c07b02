// Makes and runs the plugin of BipartiteMerge as TensorRT would, with the emulated kernels, on numbers that
// it reads: tokens and width, then tokens, sizes and keys of one item.  Writes shapes, then tokens and sizes.
#include <NvInfer.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

using namespace nvinfer1;

extern "C" IPluginCreatorInterface* const* getCreators(int32_t& count);

// Whether a plugin keeps the attributes that it is made with, as the type that its creator names.
bool keeps_attributes(IPluginCreatorV3One& creator) {
  const int32_t whole = 1;
  const float number = 0.25f;
  const PluginFieldCollection& named = *creator.getFieldNames();
  std::vector<PluginField> fields;
  for (int i = 0; i < named.nbFields; ++i) {
    const bool is_float = named.fields[i].type == PluginFieldType::kFLOAT32;
    fields.push_back({named.fields[i].name, is_float ? static_cast<const void*>(&number) : &whole,
                      named.fields[i].type, 1});
  }
  const PluginFieldCollection given{named.nbFields, fields.data()};
  std::unique_ptr<IPluginV3> made(creator.createPlugin("", &given, TensorRTPhase::kBUILD));
  auto* runtime = static_cast<IPluginV3OneRuntime*>(
      made->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  const PluginFieldCollection& kept = *runtime->getFieldsToSerialize();
  for (int i = 0; i < named.nbFields; ++i)
    if (std::strcmp(kept.fields[i].name, fields[i].name) || kept.fields[i].type != fields[i].type ||
        std::memcmp(kept.fields[i].data, fields[i].data, 4))
      return false;
  return kept.nbFields == named.nbFields;
}

int main() {
  int tokens, width, keep;
  if (std::scanf("%d %d %d", &tokens, &width, &keep) != 3) return 1;
  std::vector<float> x(tokens * width), size(tokens), metric(tokens * width);
  for (auto* values : {&x, &size, &metric})
    for (float& value : *values)
      if (std::scanf("%f", &value) != 1) return 1;

  int32_t count = 0;
  IPluginCreatorV3One* creator = nullptr;
  IPluginCreatorInterface* const* creators = getCreators(count);
  for (int i = 0; i < count; ++i) {
    auto* one = static_cast<IPluginCreatorV3One*>(creators[i]);
    std::printf("%s ", one->getPluginName());
    if (!keeps_attributes(*one)) return 6;
    if (!std::strcmp(one->getPluginName(), "BipartiteMerge")) creator = one;
  }
  const int32_t protect = 1, wanted = 2;
  const PluginField fields[] = {{"protected", &protect, PluginFieldType::kINT32, 1},
                                {"plugin_outputs", &wanted, PluginFieldType::kINT32, 1}};
  const PluginFieldCollection given{2, fields};
  std::unique_ptr<IPluginV3> first(creator->createPlugin("", &given, TensorRTPhase::kBUILD));
  const auto of = [](IPluginV3& plugin, PluginCapabilityType type) {
    return plugin.getCapabilityInterface(type);
  };
  auto* build = static_cast<IPluginV3OneBuild*>(of(*first, PluginCapabilityType::kBUILD));
  if (build->getNbOutputs() != 2) return 2;

  // Sizes stand for expressions, which the plugin only passes on.
  const auto axis = [](int64_t n) { return reinterpret_cast<const IDimensionExpr*>(n); };
  const DimsExprs inputs[] = {{3, {axis(1), axis(tokens), axis(width)}},
                              {2, {axis(1), axis(tokens)}},
                              {4, {axis(1), axis(1), axis(tokens), axis(width)}}};
  const DimsExprs counts[] = {{1, {axis(keep)}}};
  DimsExprs shapes[2] = {};
  auto& builder = *reinterpret_cast<IExprBuilder*>(&keep);
  if (build->getOutputShapes(inputs, 3, counts, 1, shapes, 2, builder)) return 3;
  PluginTensorDesc read[3] = {}, written[2] = {};
  const auto describe = [](const DimsExprs& shape, PluginTensorDesc& desc) {
    desc.dims.nbDims = shape.nbDims;
    for (int i = 0; i < shape.nbDims; ++i) desc.dims.d[i] = reinterpret_cast<int64_t>(shape.d[i]);
  };
  for (int i = 0; i < 3; ++i) describe(inputs[i], read[i]);
  for (int i = 0; i < 2; ++i) describe(shapes[i], written[i]);
  DynamicPluginTensorDesc most[5] = {};
  for (int i = 0; i < 5; ++i) {
    most[i].desc = i < 3 ? read[i] : written[i - 3];
    most[i].max = most[i].desc.dims;
    if (!build->supportsFormatCombination(i, most, 3, 2)) return 4;
  }
  const size_t bytes = build->getWorkspaceSize(most, 3, most + 3, 2);

  // What the engine keeps is what another plugin is made of.
  auto* kept = static_cast<IPluginV3OneRuntime*>(of(*first, PluginCapabilityType::kRUNTIME));
  std::unique_ptr<IPluginV3> second(
      creator->createPlugin("", kept->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
  std::unique_ptr<IPluginV3> third(second->clone());
  auto* runtime = static_cast<IPluginV3OneRuntime*>(of(*third, PluginCapabilityType::kRUNTIME));
  std::vector<float> y(keep * width), total(keep);
  std::vector<uint64_t> workspace(bytes / 8 + 2);
  const void* from[] = {x.data(), size.data(), metric.data()};
  void* to[] = {y.data(), total.data()};
  if (runtime->enqueue(read, written, from, to, workspace.data(), nullptr)) return 5;
  for (const PluginTensorDesc& one : written)
    for (int i = 0; i < one.dims.nbDims; ++i) std::printf("%d ", static_cast<int>(one.dims.d[i]));
  for (auto* values : {&y, &total})
    for (float value : *values) std::printf("%.9g ", value);
}
