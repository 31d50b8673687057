// How an operator is written: its arguments as tensors and numbers, its result assigned to an `Out`.
//
//     OPERATOR(Add, [](Tensor x, Tensor y, Scalar alpha, Out sum) { sum = at::add(x, y, alpha); })
//
// makes aclnnAddGetWorkspaceSize, which torch_npu calls with pointers to descriptors that live no longer than the call. It
// copies them into the executor. aclnnAdd, called later on the thread of torch_npu's queue, gives the computation to the
// stream. The order of parameters is that of CANN's aclnn interface.
//
// A `Tensor` of half precision arrives as float32 and an `Out` rounds when it is assigned: like the units of a card, operators
// add up in float32 and round once. What is changed in place is an `Out` whose `value()` is read first. A `View` is the memory
// itself, for what moves numbers.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "../stub.h"

// What the aclCreate… functions make.

struct aclTensor {
    std::vector<int64_t> sizes;
    std::vector<int64_t> strides;
    int64_t offset;
    int dtype;
    int format;
    std::vector<int64_t> storage;  // sizes of the memory, which a tiled format orders otherwise
    char* data;
};
struct aclScalar {
    at::Scalar value;
};
struct aclIntArray {
    std::vector<int64_t> values;
};
struct aclFloatArray {
    std::vector<double> values;
};
struct aclBoolArray {
    std::vector<bool> values;
};
struct aclTensorList {
    std::vector<aclTensor> tensors;
};
struct aclScalarList {
    std::vector<at::Scalar> values;
};
struct aclOpExecutor {
    const char* name;
    std::vector<aclTensor> tensors;
    std::function<void()> compute;
};

namespace stub {

constexpr int INT4 = 29;         // of aclDataType
constexpr int FRACTAL_NZ = 29;   // of aclFormat
constexpr int REFUSED = 161002;  // ACLNN_ERR_PARAM_INVALID

at::ScalarType scalar_type(int dtype);
// The numbers that a descriptor describes, sharing its memory; tiled ones as a copy in rows.
at::Tensor view(const aclTensor& descriptor);
at::Tensor untiled(const aclTensor& descriptor);
// A matrix of tiles [N/C, K/R, R, C] in rows [K, N], with what fills the last tiles up.
at::Tensor rows_of_tiles(const at::Tensor& tiles);
void assign(const aclTensor& descriptor, const at::Tensor& value);

// Thrown by an operator for what the device's own library refuses.
struct Refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};
inline void require(bool holds, const std::string& message) {
    if (!holds)
        throw Refused(message);
}

// Kinds of parameters. `Wire` is what torch_npu passes, `Kept` what the executor keeps of it, `take` what the operator gets.

inline at::Tensor wide(const at::Tensor& tensor) {
    return at::isReducedFloatingType(tensor.scalar_type()) ? tensor.to(at::kFloat) : tensor;
}

struct Out {
    aclTensor descriptor;
    void operator=(const at::Tensor& value) const { assign(descriptor, value); }
    at::Tensor view() const { return stub::view(descriptor); }
    at::Tensor value() const { return wide(view()); }
};
struct View : at::Tensor {
    View(const at::Tensor& tensor) : at::Tensor(tensor) {}
};
struct Raw : aclTensor {};  // the descriptor, for operators that depend on its format
struct Dtype {
    at::ScalarType value;
};
using Scalar = at::Scalar;
using Ints = std::vector<int64_t>;
using Floats = std::vector<double>;
using Bools = std::vector<bool>;
using Tensors = std::vector<at::Tensor>;
struct Views : Tensors {};
// An output whose first dimensions only the computation knows. torch_npu keeps its descriptor until it has asked for them.
struct Found {
    aclTensor* descriptor;
    void operator=(const at::Tensor& value) const;
};
using at::Tensor;
template <class T> using Maybe = std::optional<T>;

template <class T> struct Parameter {  // numbers
    using Wire = T;
    using Kept = T;
    static Kept keep(Wire wire) { return wire; }
    static T take(const Kept& kept) { return kept; }
};
template <class T> struct Described {
    using Wire = const T*;
    using Kept = T;
    static Kept keep(Wire wire) {
        require(wire, "a required argument is missing");
        return *wire;
    }
};
template <> struct Parameter<at::Tensor> : Described<aclTensor> {
    static at::Tensor take(const aclTensor& kept) { return wide(view(kept)); }
};
template <> struct Parameter<View> : Described<aclTensor> {
    static View take(const aclTensor& kept) { return view(kept); }
};
template <> struct Parameter<Raw> : Described<aclTensor> {
    static Raw take(const aclTensor& kept) { return {kept}; }
};
template <> struct Parameter<Out> : Described<aclTensor> {
    static Out take(const aclTensor& kept) { return {kept}; }
};
template <> struct Parameter<Scalar> : Described<aclScalar> {
    static Scalar take(const aclScalar& kept) { return kept.value; }
};
template <> struct Parameter<Ints> : Described<aclIntArray> {
    static Ints take(const aclIntArray& kept) { return kept.values; }
};
template <> struct Parameter<Floats> : Described<aclFloatArray> {
    static Floats take(const aclFloatArray& kept) { return kept.values; }
};
template <> struct Parameter<Bools> : Described<aclBoolArray> {
    static Bools take(const aclBoolArray& kept) { return kept.values; }
};
template <> struct Parameter<Tensors> : Described<aclTensorList> {
    static Tensors take(const aclTensorList& kept) {
        Tensors made;
        for (const auto& tensor : kept.tensors)
            made.push_back(wide(view(tensor)));
        return made;
    }
};
template <> struct Parameter<Views> : Described<aclTensorList> {
    static Views take(const aclTensorList& kept) {
        Views made;
        for (const auto& tensor : kept.tensors)
            made.push_back(view(tensor));
        return made;
    }
};
template <> struct Parameter<Found> {
    using Wire = aclTensor*;
    using Kept = aclTensor*;
    static Kept keep(Wire wire) { return wire; }
    static Found take(Kept kept) { return {kept}; }
};
template <> struct Parameter<Dtype> {
    using Wire = int;
    using Kept = int;
    static Kept keep(Wire wire) { return wire; }
    static Dtype take(Kept kept) { return {scalar_type(kept)}; }
};
template <> struct Parameter<std::string> {
    using Wire = const char*;
    using Kept = std::string;
    static Kept keep(Wire wire) { return wire ? wire : ""; }
    static std::string take(const Kept& kept) { return kept; }
};
template <class T> struct Parameter<Maybe<T>> {  // what a null pointer leaves out
    using Wire = typename Parameter<T>::Wire;
    using Kept = std::optional<typename Parameter<T>::Kept>;
    static Kept keep(Wire wire) { return wire ? Kept(Parameter<T>::keep(wire)) : std::nullopt; }
    static Maybe<T> take(const Kept& kept) { return kept ? Maybe<T>(Parameter<T>::take(*kept)) : std::nullopt; }
};

inline void note(std::vector<aclTensor>& tensors, const aclTensor* tensor) {
    if (tensor)
        tensors.push_back(*tensor);
}
inline void note(std::vector<aclTensor>& tensors, aclTensor* tensor) { note(tensors, const_cast<const aclTensor*>(tensor)); }
inline void note(std::vector<aclTensor>& tensors, const aclTensorList* list) {
    if (list)
        tensors.insert(tensors.end(), list->tensors.begin(), list->tensors.end());
}
template <class T> void note(std::vector<aclTensor>&, const T&) {}

constexpr auto accept = [](const auto&...) {};

template <class Compute> struct Entry : Entry<decltype(&Compute::operator())> {};
template <class Compute, class... T> struct Entry<void (Compute::*)(T...) const> {
    template <const char* name, const Compute& compute, const auto& check>
    static int begin(typename Parameter<std::decay_t<T>>::Wire... arguments, uint64_t* workspace, aclOpExecutor** executor) {
        try {
            check(arguments...);
            std::vector<aclTensor> tensors;
            (note(tensors, arguments), ...);
            auto kept = std::make_tuple(Parameter<std::decay_t<T>>::keep(arguments)...);
            *workspace = 0;
            *executor = new aclOpExecutor{name, std::move(tensors), [kept = std::move(kept)] {
                std::apply([](const auto&... each) { compute(Parameter<std::decay_t<T>>::take(each)...); }, kept);
            }};
            return 0;
        } catch (const Refused& error) {
            return fail(REFUSED, std::string(name) + ": " + error.what());
        }
    }
};

}  // namespace stub

#define OPERATOR(name, ...) CHECKED_OPERATOR(name, stub::accept, __VA_ARGS__)

// With what the device's own library refuses: `check` gets the arguments as torch_npu passes them, and throws Refused.
#define CHECKED_OPERATOR(name, check, ...)                                                                              \
    namespace {                                                                                                         \
    constexpr char name_##name[] = "aclnn" #name;                                                                       \
    constexpr auto compute_##name = __VA_ARGS__;                                                                        \
    }                                                                                                                   \
    extern "C" __attribute__((used, visibility("hidden"))) void* const entry_##name =                                   \
        (void*)&stub::Entry<std::decay_t<decltype(compute_##name)>>::template begin<name_##name, compute_##name, check>; \
    asm(".text\n.globl aclnn" #name "GetWorkspaceSize\n.type aclnn" #name "GetWorkspaceSize,@function\n"                \
        "aclnn" #name "GetWorkspaceSize: jmp *entry_" #name "(%rip)\n");
