#include "onnxruntime/host.h"

#include <memory>

namespace thresher::ort {

void Api::check(Status* status) const {
  if (!status) return;
  const std::string message =
      get<const char* (*)(const Status*)>(GET_ERROR_MESSAGE)(status);
  get<void (*)(Status*)>(RELEASE_STATUS)(status);
  throw Error(message);
}

Status* Api::status(const char* message) const {
  return get<Status* (*)(int, const char*)>(CREATE_STATUS)(INVALID_ARGUMENT, message);
}

int64_t NodeAttributes::integer(const char* name) const {
  int64_t value = 0;
  api.check(api.get<Status* (*)(const KernelInfo*, const char*, int64_t*)>(
      GET_ATTRIBUTE_INT64)(info, name, &value));
  return value;
}

float NodeAttributes::number(const char* name) const {
  float value = 0;
  api.check(api.get<Status* (*)(const KernelInfo*, const char*, float*)>(
      GET_ATTRIBUTE_FLOAT)(info, name, &value));
  return value;
}

std::string NodeAttributes::text(const char* name) const {
  const auto get = api.get<Status* (*)(const KernelInfo*, const char*, char*, size_t*)>(
      GET_ATTRIBUTE_STRING);
  size_t size = 0;  // the zero at the end is in it
  api.check(get(info, name, nullptr, &size));
  std::string value(size, 0);
  api.check(get(info, name, value.data(), &size));
  value.resize(size - 1);
  return value;
}

const void* Run::read(size_t index, Shape& shape) const {
  const Value* value = nullptr;
  api.check(api.get<Status* (*)(const KernelContext*, size_t, const Value**)>(
      GET_INPUT)(handle, index, &value));
  if (!value) throw Error("input " + std::to_string(index) + " is missing");
  ShapeInfo* info = nullptr;
  api.check(api.get<Status* (*)(const Value*, ShapeInfo**)>(
      GET_TENSOR_TYPE_AND_SHAPE)(value, &info));
  const std::unique_ptr<ShapeInfo, void (*)(ShapeInfo*)> held(
      info, api.get<void (*)(ShapeInfo*)>(RELEASE_SHAPE_INFO));
  size_t rank = 0;
  api.check(api.get<Status* (*)(const ShapeInfo*, size_t*)>(GET_DIMENSIONS_COUNT)(
      info, &rank));
  shape.resize(rank);
  api.check(api.get<Status* (*)(const ShapeInfo*, int64_t*, size_t)>(
      GET_DIMENSIONS)(info, shape.data(), rank));
  void* data = nullptr;
  api.check(api.get<Status* (*)(const Value*, void**)>(GET_TENSOR_MUTABLE_DATA)(
      value, &data));
  return data;
}

void* Run::write(size_t index, const Shape& shape) const {
  size_t wanted = 0;
  api.check(api.get<Status* (*)(const KernelContext*, size_t*)>(GET_OUTPUT_COUNT)(
      handle, &wanted));
  if (index >= wanted) return nullptr;
  Value* value = nullptr;
  api.check(
      api.get<Status* (*)(KernelContext*, size_t, const int64_t*, size_t, Value**)>(
          GET_OUTPUT)(handle, index, shape.data(), shape.size(), &value));
  if (!value) return nullptr;
  void* data = nullptr;
  api.check(api.get<Status* (*)(const Value*, void**)>(GET_TENSOR_MUTABLE_DATA)(
      value, &data));
  return data;
}

void Run::run(void (*part)(void*, size_t), size_t parts, void* job) const {
  api.check(
      api.get<Status* (*)(const KernelContext*, void (*)(void*, size_t), size_t, size_t,
                                void*)>(PARALLEL_FOR)(handle, part, parts, 0, job));
}

namespace {

struct Instance {
  Instance(Table table, const KernelInfo* info, const Implementation& of)
      : api(table), of(of), kernel(of.make(NodeAttributes(api, info)), of.release) {
    for (size_t input = 0; input < of.signature->input_count; ++input) {
      int constant = 0;
      const Value* value = nullptr;
      api.check(api.get<Status* (*)(const KernelInfo*, size_t, int*, const Value**)>(
          GET_CONSTANT_INPUT)(info, input, &constant, &value));
      constants.push_back(constant != 0);
    }
  }
  const Api api;
  const Implementation& of;
  std::vector<bool> constants;
  const std::unique_ptr<void, void (*)(void*)> kernel;
};

// An Error becomes the status of the run; nothing is thrown through ONNX Runtime.
template <class Body>
Status* guarded(const Api& api, const Implementation& of, const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    return api.status((std::string(of.signature->name) + ": " + error.what()).c_str());
  }
}

struct Operator : CustomOp {
  explicit Operator(const Implementation& of);
  const Implementation& of;
};

const Implementation& of(const CustomOp* op) { return static_cast<const Operator*>(op)->of; }

constexpr CustomOp CALLBACKS{
    OP_VERSION,
    nullptr,
    [](const CustomOp* op) { return of(op).signature->name; },
    [](const CustomOp*) { return "CPUExecutionProvider"; },
    [](const CustomOp* op, size_t i) { return of(op).typed(of(op).signature->inputs[i]); },
    [](const CustomOp* op) { return of(op).signature->input_count; },
    [](const CustomOp* op, size_t i) { return of(op).typed(of(op).signature->outputs[i]); },
    [](const CustomOp* op) { return of(op).signature->output_count; },
    nullptr,
    [](void* kernel) { delete static_cast<Instance*>(kernel); },
    [](const CustomOp*, size_t) { return REQUIRED; },
    [](const CustomOp*, size_t i) { return i ? OPTIONAL : REQUIRED; },
    [](const CustomOp*, size_t) { return 0; },
    [](const CustomOp*) { return 1; },
    [](const CustomOp*) { return 1; },
    [](const CustomOp*) { return 1; },
    [](const CustomOp*) { return 1; },
    [](const CustomOp* op, Table api, const KernelInfo* info, void** kernel) {
      return guarded(Api(api), of(op), [&] { *kernel = new Instance(api, info, of(op)); });
    },
    [](void* kernel, KernelContext* given) {
      const Instance& one = *static_cast<Instance*>(kernel);
      return guarded(one.api, one.of,
                     [&] { one.of.compute(one.kernel.get(), Run(one.api, given, one.constants)); });
    },
};

Operator::Operator(const Implementation& of) : CustomOp(CALLBACKS), of(of) {}

}  // namespace

void Domain::add(const Implementation& of) const {
  api.check(api.get<Status* (*)(CustomOpDomain*, const CustomOp*)>(CUSTOM_OP_DOMAIN_ADD)(
      handle, new Operator(of)));  // which the domain refers to for good
}

}  // namespace thresher::ort
