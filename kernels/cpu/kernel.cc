#include "cpu/kernel.h"

namespace thresher {

std::string text(const Shape& shape) {
  std::string said = "[";
  for (size_t i = 0; i < shape.size(); ++i) said += (i ? ", " : "") + std::to_string(shape[i]);
  return said + "]";
}

void Api::check(ort::Status* status) const {
  if (!status) return;
  const std::string message =
      get<const char* (*)(const ort::Status*)>(ort::GET_ERROR_MESSAGE)(status);
  get<void (*)(ort::Status*)>(ort::RELEASE_STATUS)(status);
  throw Error(message);
}

ort::Status* Api::status(const char* message) const {
  return get<ort::Status* (*)(int, const char*)>(ort::CREATE_STATUS)(ort::INVALID_ARGUMENT, message);
}

int64_t Attributes::integer(const char* name) const {
  int64_t value = 0;
  api_.check(api_.get<ort::Status* (*)(const ort::KernelInfo*, const char*, int64_t*)>(
      ort::GET_ATTRIBUTE_INT64)(info_, name, &value));
  return value;
}

float Attributes::number(const char* name) const {
  float value = 0;
  api_.check(api_.get<ort::Status* (*)(const ort::KernelInfo*, const char*, float*)>(
      ort::GET_ATTRIBUTE_FLOAT)(info_, name, &value));
  return value;
}

std::string Attributes::text(const char* name) const {
  const auto get = api_.get<ort::Status* (*)(const ort::KernelInfo*, const char*, char*, size_t*)>(
      ort::GET_ATTRIBUTE_STRING);
  size_t size = 0;  // the zero at the end is in it
  api_.check(get(info_, name, nullptr, &size));
  std::string value(size, 0);
  api_.check(get(info_, name, value.data(), &size));
  value.resize(size - 1);
  return value;
}

const void* Context::read(size_t index, Shape& shape) const {
  const ort::Value* value = nullptr;
  api_.check(api_.get<ort::Status* (*)(const ort::KernelContext*, size_t, const ort::Value**)>(
      ort::GET_INPUT)(context_, index, &value));
  if (!value) throw Error("input " + std::to_string(index) + " is missing");
  ort::ShapeInfo* info = nullptr;
  api_.check(api_.get<ort::Status* (*)(const ort::Value*, ort::ShapeInfo**)>(
      ort::GET_TENSOR_TYPE_AND_SHAPE)(value, &info));
  const std::unique_ptr<ort::ShapeInfo, void (*)(ort::ShapeInfo*)> held(
      info, api_.get<void (*)(ort::ShapeInfo*)>(ort::RELEASE_SHAPE_INFO));
  size_t rank = 0;
  api_.check(api_.get<ort::Status* (*)(const ort::ShapeInfo*, size_t*)>(ort::GET_DIMENSIONS_COUNT)(
      info, &rank));
  shape.resize(rank);
  api_.check(api_.get<ort::Status* (*)(const ort::ShapeInfo*, int64_t*, size_t)>(
      ort::GET_DIMENSIONS)(info, shape.data(), rank));
  void* data = nullptr;
  api_.check(api_.get<ort::Status* (*)(const ort::Value*, void**)>(ort::GET_TENSOR_MUTABLE_DATA)(
      value, &data));
  return data;
}

int64_t Context::scalar(size_t index) const {
  const Tensor<int64_t> found = input<int64_t>(index);
  demand(found.count() == 1, "a count is one number", found.shape);
  return *found.data;
}

void* Context::write(size_t index, const Shape& shape) const {
  size_t wanted = 0;
  api_.check(api_.get<ort::Status* (*)(const ort::KernelContext*, size_t*)>(ort::GET_OUTPUT_COUNT)(
      context_, &wanted));
  if (index >= wanted) return nullptr;
  ort::Value* value = nullptr;
  api_.check(
      api_.get<ort::Status* (*)(ort::KernelContext*, size_t, const int64_t*, size_t, ort::Value**)>(
          ort::GET_OUTPUT)(context_, index, shape.data(), shape.size(), &value));
  if (!value) return nullptr;
  void* data = nullptr;
  api_.check(api_.get<ort::Status* (*)(const ort::Value*, void**)>(ort::GET_TENSOR_MUTABLE_DATA)(
      value, &data));
  return data;
}

void Context::run(void (*part)(void*, size_t), size_t parts, void* job) const {
  api_.check(
      api_.get<ort::Status* (*)(const ort::KernelContext*, void (*)(void*, size_t), size_t, size_t,
                                void*)>(ort::PARALLEL_FOR)(context_, part, parts, 0, job));
}

void Library::add(const ort::CustomOp& op) const {
  api_.check(api_.get<ort::Status* (*)(ort::CustomOpDomain*, const ort::CustomOp*)>(
      ort::CUSTOM_OP_DOMAIN_ADD)(domain_, &op));
}

}  // namespace thresher
