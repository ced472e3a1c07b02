// OpenVINO as the host of kernels: an extension with one class of nodes for all operators.
//
// Its C++ interface is not stable, so a library belongs to one release.
#include <tbb/parallel_for.h>

#include <deque>
#include <map>
#include <memory>
#include <openvino/core/extension.hpp>
#include <openvino/frontend/onnx/extension/conversion.hpp>
#include <openvino/op/constant.hpp>
#include <openvino/op/op.hpp>
#include <variant>

#include "cpu/kernel.h"
#include "operators.h"  // ROWS, written from the registry when the library is built

namespace thresher::openvino {
namespace {

using Type = ov::element::Type;
using TypeInfo = ov::DiscreteTypeInfo;

Type type_of(Element element) {
  switch (element) {
    case Element::FLOAT: return ov::element::f32;
    case Element::UINT8: return ov::element::u8;
    case Element::INT8: return ov::element::i8;
    case Element::INT32: return ov::element::i32;
    case Element::INT64: return ov::element::i64;
    case Element::BOOL: return ov::element::boolean;
    case Element::FLOAT16: return ov::element::f16;
    case Element::DOUBLE: return ov::element::f64;
    case Element::BFLOAT16: return ov::element::bf16;
  }
  return ov::element::dynamic;
}

// The CPU plugin keeps whole numbers in 32 bits and truth in bytes.
bool accepts(Element wanted, const Type& given) {
  return given == type_of(wanted) || (wanted == Element::INT64 && given == ov::element::i32) ||
         (wanted == Element::BOOL && given == ov::element::u8);
}

constexpr char OUTPUTS[] = "plugin_outputs";  // how many a node has; lowering leaves out what nobody reads

using Value = std::variant<int64_t, float, std::string>;

struct NodeAttributes final : Attributes, std::map<std::string, Value> {
  int64_t integer(const char* name) const override { return std::get<int64_t>(at(name)); }
  float number(const char* name) const override { return std::get<float>(at(name)); }
  std::string text(const char* name) const override { return std::get<std::string>(at(name)); }
};

struct Run final : Context {
  Run(const ov::Node& node, const Implementation& of, ov::TensorVector& outputs, const ov::TensorVector& inputs)
      : node(node), of(of), outputs(outputs), inputs(inputs) {}

  bool constant(size_t index) const override {
    return ov::is_type<ov::op::v0::Constant>(node.get_input_node_ptr(index));
  }
  const void* read(size_t index, Shape& shape) const override {
    const ov::Tensor& from = inputs.at(index);
    shape.assign(from.get_shape().begin(), from.get_shape().end());
    const bool whole = of.typed(of.signature->inputs[index]) == Element::INT64;
    if (!whole || from.get_element_type() == ov::element::i64) return from.data();
    const int32_t* first = from.data<const int32_t>();
    return widened.emplace_back(first, first + from.get_size()).data();
  }
  void* write(size_t index, const Shape& shape) const override {
    if (index >= outputs.size()) return nullptr;
    const ov::Shape wanted(shape.begin(), shape.end());
    if (outputs[index].get_shape() != wanted) outputs[index].set_shape(wanted);
    return outputs[index].data();
  }
  // In the arena of whoever calls, so on no more threads than the plugin was given.
  void run(void (*part)(void*, size_t), size_t parts, void* job) const override {
    tbb::parallel_for(size_t{0}, parts, [&](size_t at) { part(job, at); });
  }

  const ov::Node& node;
  const Implementation& of;
  ov::TensorVector& outputs;
  const ov::TensorVector& inputs;
  mutable std::deque<std::vector<int64_t>> widened;
};

struct Operator {
  const Row& row;
  const TypeInfo info;
  std::vector<const Implementation*> implementations;
};

class Node final : public ov::op::Op {
 public:
  Node(const Operator& of, const NodeAttributes& attributes, const ov::OutputVector& inputs)
      : Op(inputs), operator_(of), attributes_(attributes) {
    constructor_validate_and_infer_types();
  }
  const TypeInfo& get_type_info() const override { return operator_.info; }
  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<Node>(operator_, attributes_, inputs);
  }
  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    for (auto& one : attributes_)
      std::visit([&](auto& value) { visitor.on_attribute(one.first, value); }, one.second);
    return true;
  }
  void validate_and_infer_types() override {
    implementation_ = implementation();
    NODE_VALIDATION_CHECK(this, implementation_, "no kernel takes inputs of these types");
    guarded([&] { kernel_ = {implementation_->make(attributes_), implementation_->release}; });
    const Signature& signature = *implementation_->signature;
    const int64_t wanted = attributes_.integer(OUTPUTS);
    NODE_VALIDATION_CHECK(this, wanted >= 1 && wanted <= static_cast<int64_t>(signature.output_count),
                          OUTPUTS, " is ", wanted);
    for (size_t i = 0; i < static_cast<size_t>(wanted); ++i)
      set_output_type(i, type_of(implementation_->typed(signature.outputs[i])), shape(i));
  }
  bool has_evaluate() const override { return true; }
  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    guarded([&] {
      implementation_->compute(kernel_.get(), Run(*this, *implementation_, outputs, inputs));
    });
    return true;
  }

 private:
  template <class Body>
  void guarded(const Body& body) const {
    try {
      body();
    } catch (const std::exception& error) {
      throw Error(std::string(operator_.row.name) + ": " + error.what());
    }
  }

  const Implementation* implementation() const {
    for (const Implementation* one : operator_.implementations) {
      const Signature& signature = *one->signature;
      bool fits = signature.input_count == get_input_size();
      for (size_t i = 0; fits && i < get_input_size(); ++i)
        fits = accepts(one->typed(signature.inputs[i]), get_input_element_type(i));
      if (fits) return one;
    }
    return nullptr;
  }

  ov::PartialShape shape(size_t output) const {
    std::vector<ov::Dimension> found;
    for (const Axis& axis : operator_.row.outputs[output]) {
      if (axis.first == COUNT) {
        found.push_back(count(axis.input));
        continue;
      }
      const ov::PartialShape& from = get_input_partial_shape(axis.input);
      if (from.rank().is_dynamic()) return ov::PartialShape::dynamic();
      const size_t first = static_cast<size_t>(axis.first);
      const size_t last = axis.rest ? from.size() : first + 1;
      NODE_VALIDATION_CHECK(this, last <= from.size(), "input ", axis.input, " has rank ",
                            from.size());
      found.insert(found.end(), from.begin() + static_cast<ptrdiff_t>(first),
                   from.begin() + static_cast<ptrdiff_t>(last));
    }
    return found;
  }
  // Known of constants only; what no axis can be is left to the kernel, which refuses it.
  ov::Dimension count(size_t input) const {
    const auto given =
        ov::as_type_ptr<ov::op::v0::Constant>(input_value(input).get_node_shared_ptr());
    if (!given || ov::shape_size(given->get_shape()) != 1) return {};
    const int64_t value = given->cast_vector<int64_t>()[0];
    return value < 0 ? ov::Dimension() : ov::Dimension(value);
  }

  const Operator& operator_;
  NodeAttributes attributes_;
  const Implementation* implementation_ = nullptr;
  std::shared_ptr<void> kernel_;
};

// Takes the operators that have a row; graphs with others run their bodies.
struct Operators final : Library {
  void add(const Implementation& of) const override {
    const std::string name = of.signature->name;
    for (const Row& row : ROWS)
      if (row.name == name)
        by_name.try_emplace(name, Operator{row, TypeInfo(row.name, "thresher"), {}})
            .first->second.implementations.push_back(&of);
  }
  mutable std::map<std::string, Operator> by_name;
};

std::shared_ptr<Node> read(const Operator& of, const ov::frontend::NodeContext& node) {
  NodeAttributes attributes;
  for (const Attribute& one : of.row.attributes) switch (one.kind) {
      case Kind::INTEGER: attributes[one.name] = node.get_attribute<int64_t>(one.name); break;
      case Kind::NUMBER: attributes[one.name] = node.get_attribute<float>(one.name); break;
      case Kind::TEXT: attributes[one.name] = node.get_attribute<std::string>(one.name); break;
    }
  attributes[OUTPUTS] = node.get_attribute<int64_t>(OUTPUTS, of.row.outputs.size());
  ov::OutputVector inputs;
  for (size_t i = 0; i < node.get_input_size(); ++i)
    inputs.push_back(node.get_input(static_cast<int>(i)));
  return std::make_shared<Node>(of, attributes, inputs);
}

std::vector<ov::Extension::Ptr> extensions() {
  static const Operators& operators = []() -> const Operators& {
    const auto* made = new Operators;  // nodes refer to them until the process ends
    add_operators(*made);
    return *made;
  }();
  std::vector<ov::Extension::Ptr> made;
  for (const auto& [name, of] : operators.by_name)
    made.push_back(std::make_shared<ov::frontend::onnx::ConversionExtension>(
        name, "thresher",
        [&of = of](const ov::frontend::NodeContext& node) { return read(of, node)->outputs(); }));
  return made;
}

}  // namespace
}  // namespace thresher::openvino

OPENVINO_CREATE_EXTENSIONS(thresher::openvino::extensions())
