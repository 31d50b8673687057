// Descriptors, the tiled format, and the launch of what an executor holds.
#include "operator.h"

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <sstream>

namespace {

constexpr int FAILED = 561000;  // ACLNN_ERR_INNER

// Numbers of aclDataType.
const std::vector<std::pair<int, at::ScalarType>> TYPES = {
    {0, at::kFloat}, {1, at::kHalf},  {2, at::kChar},    {3, at::kInt},   {4, at::kByte},           {6, at::kShort},
    {9, at::kLong},  {11, at::kDouble}, {12, at::kBool}, {16, at::kComplexFloat}, {27, at::kBFloat16},
};

template <class T> std::string list(const std::vector<T>& values) {
    std::ostringstream text;
    text << "[";
    for (size_t i = 0; i < values.size(); i++)
        text << (i ? ", " : "") << values[i];
    text << "]";
    return text.str();
}

std::string dtype_name(int dtype) {
    for (auto [number, type] : TYPES)
        if (number == dtype)
            return at::toString(type);
    return dtype == stub::INT4 ? "Int4" : std::to_string(dtype);
}

std::string described(const aclTensor& tensor) {
    return "{\"dtype\": \"" + dtype_name(tensor.dtype) + "\", \"format\": " + std::to_string(tensor.format) +
           ", \"shape\": " + list(tensor.sizes) + ", \"strides\": " + list(tensor.strides) +
           ", \"storage\": " + list(tensor.storage) + ", \"card\": " + std::to_string(stub::card_of_memory(tensor.data)) + "}";
}

void log_launch(const aclOpExecutor& executor, int card) {
    std::string fields = "\"event\": \"launch\", \"card\": " + std::to_string(card) + ", \"operator\": \"" +
                         executor.name + "\", \"computed\": true, \"tensors\": [";
    for (size_t i = 0; i < executor.tensors.size(); i++)
        fields += (i ? ", " : "") + described(executor.tensors[i]);
    stub::log(fields + "]");
}

bool is_empty(const aclTensor& tensor) {
    return std::find(tensor.sizes.begin(), tensor.sizes.end(), 0) != tensor.sizes.end();
}

// A card reads no memory of another card, nor ordinary memory of the host.
void require_on_card(const aclOpExecutor& executor, int card) {
    for (const auto& tensor : executor.tensors)
        stub::require(is_empty(tensor) || stub::card_of_memory(tensor.data) == card,
                      std::string(executor.name) + " runs on card " + std::to_string(card) + " and was given memory of " +
                          std::to_string(stub::card_of_memory(tensor.data)));
}

}  // namespace

namespace stub {

at::ScalarType scalar_type(int dtype) {
    for (auto [number, type] : TYPES)
        if (number == dtype)
            return type;
    throw Refused("the stub has no dtype " + std::to_string(dtype));
}

at::Tensor view(const aclTensor& descriptor) {
    if (descriptor.format == FRACTAL_NZ)
        return untiled(descriptor);
    const auto type = scalar_type(descriptor.dtype);
    return at::from_blob(descriptor.data + descriptor.offset * at::elementSize(type), descriptor.sizes, descriptor.strides,
                         at::TensorOptions(type));
}

// FRACTAL_NZ keeps a matrix [K, N] as [N/C, K/16, 16, C]: blocks of 16 rows and C columns, the blocks of a column together.
at::Tensor rows_of_tiles(const at::Tensor& tiles) {
    return tiles.transpose(-4, -3).transpose(-3, -2).flatten(-4, -3).flatten(-2, -1);
}

at::Tensor untiled(const aclTensor& descriptor) {
    require(descriptor.storage.size() >= 4, "a tiled tensor has at least four dimensions");
    const auto tiles = at::from_blob(descriptor.data, descriptor.storage, at::TensorOptions(scalar_type(descriptor.dtype)));
    auto padded = rows_of_tiles(tiles);
    const auto dims = descriptor.sizes.size();
    if (descriptor.strides[dims - 1] != 1)  // a transposed view of a tiled matrix is described by its strides
        padded = padded.transpose(-2, -1);
    return padded.narrow(-2, 0, descriptor.sizes[dims - 2]).narrow(-1, 0, descriptor.sizes[dims - 1]);
}

void assign_tiles(const aclTensor& descriptor, const at::Tensor& value) {
    auto tiles = at::from_blob(descriptor.data, descriptor.storage, at::TensorOptions(scalar_type(descriptor.dtype)));
    const auto columns = tiles.size(-4), rows = tiles.size(-3), height = tiles.size(-2), width = tiles.size(-1);
    const auto padded = at::constant_pad_nd(
        value, {0, columns * width - value.size(-1), 0, rows * height - value.size(-2)});
    auto blocks = padded.unflatten(-1, {columns, width}).unflatten(-3, {rows, height});
    tiles.copy_(blocks.transpose(-3, -2).transpose(-4, -3));
}

void assign(const aclTensor& descriptor, const at::Tensor& value) {
    if (descriptor.format == FRACTAL_NZ)
        return assign_tiles(descriptor, value);
    auto memory = view(descriptor);
    require(value.numel() == memory.numel(), "a result has another number of elements than its output");
    memory.copy_(value.reshape(memory.sizes()));
}

void Found::operator=(const at::Tensor& value) const {
    const auto type = scalar_type(descriptor->dtype);
    const auto found = value.to(type).contiguous();
    memcpy(descriptor->data + descriptor->offset * at::elementSize(type), found.data_ptr(), found.nbytes());
    descriptor->sizes = found.sizes().vec();
    descriptor->strides = found.strides().vec();
}

}  // namespace stub

extern "C" {

aclTensor* aclCreateTensor(const int64_t* sizes, uint64_t dims, int dtype, const int64_t* strides, int64_t offset, int format,
                           const int64_t* storage, uint64_t storage_dims, void* data) {
    return new aclTensor{{sizes, sizes + dims}, {strides, strides + dims}, offset, dtype, format,
                         {storage, storage + storage_dims}, static_cast<char*>(data)};
}

aclScalar* aclCreateScalar(void* value, int dtype) {
    const auto type = stub::scalar_type(dtype);
    return new aclScalar{at::from_blob(value, {}, at::TensorOptions(type)).item()};
}

aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t count) { return new aclIntArray{{values, values + count}}; }
aclFloatArray* aclCreateFloatArray(const float* values, uint64_t count) { return new aclFloatArray{{values, values + count}}; }
aclBoolArray* aclCreateBoolArray(const bool* values, uint64_t count) { return new aclBoolArray{std::vector<bool>(values, values + count)}; }

aclTensorList* aclCreateTensorList(const aclTensor* const* tensors, uint64_t count) {
    auto* list = new aclTensorList;
    for (uint64_t i = 0; i < count; i++)
        list->tensors.push_back(*tensors[i]);
    return list;
}

aclScalarList* aclCreateScalarList(const aclScalar* const* scalars, uint64_t count) {
    auto* list = new aclScalarList;
    for (uint64_t i = 0; i < count; i++)
        list->values.push_back(scalars[i]->value);
    return list;
}

int aclGetViewShape(const aclTensor* tensor, int64_t** sizes, uint64_t* dims) {
    *dims = tensor->sizes.size();
    *sizes = new int64_t[*dims];
    std::copy(tensor->sizes.begin(), tensor->sizes.end(), *sizes);
    return 0;
}

int aclDestroyTensor(const aclTensor* tensor) { return delete tensor, 0; }
int aclDestroyScalar(const aclScalar* scalar) { return delete scalar, 0; }
int aclDestroyIntArray(const aclIntArray* array) { return delete array, 0; }
int aclDestroyFloatArray(const aclFloatArray* array) { return delete array, 0; }
int aclDestroyBoolArray(const aclBoolArray* array) { return delete array, 0; }
int aclDestroyTensorList(const aclTensorList* list) { return delete list, 0; }
int aclDestroyScalarList(const aclScalarList* list) { return delete list, 0; }

// The second phase of every operator: build.py lets all names aclnnX lead here. An operator without a kernel has no executor.
int stub_execute(void*, uint64_t, aclOpExecutor* given, void* stream) {
    const std::unique_ptr<aclOpExecutor> executor(given);
    if (!executor)
        return 0;
    const int card = stub::card_of_stream(stream);
    if (stub::logs())
        log_launch(*executor, card);
    try {
        require_on_card(*executor, card);
        stub::submit(stream, [compute = std::move(executor->compute)] {
            // Below autograd, and below the modes of whoever called torch_npu: plain kernels of the CPU.
            c10::impl::ExcludeDispatchKeyGuard below(
                c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset |
                c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot}));
            compute();
        });
    } catch (const std::exception& error) {
        return stub::fail(FAILED, std::string(executor->name) + ": " + error.what());
    }
    return 0;
}

int stub_not_computed(const char* name) { return stub::not_computed(name); }

}  // extern "C"
