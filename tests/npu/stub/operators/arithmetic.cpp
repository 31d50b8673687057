// Element by element.
#include "operator.h"

namespace stub {

// f(x), and the same in place.
#define UNARY(name, function)                                           \
    OPERATOR(name, [](Tensor x, Out y) { y = function(x); })            \
    OPERATOR(Inplace##name, [](Out x) { x = function(x.value()); })

UNARY(Abs, at::abs)
UNARY(BitwiseNot, at::bitwise_not)
UNARY(Ceil, at::ceil)
UNARY(Cos, at::cos)
UNARY(Erf, at::erf)
UNARY(Exp, at::exp)
UNARY(Exp2, at::exp2)
UNARY(Expm1, at::expm1)
UNARY(Floor, at::floor)
UNARY(Log, at::log)
UNARY(Log1p, at::log1p)
UNARY(Log2, at::log2)
UNARY(Neg, at::neg)
UNARY(Reciprocal, at::reciprocal)
UNARY(Relu, at::relu)
UNARY(Round, at::round)
UNARY(Rsqrt, at::rsqrt)
UNARY(Sigmoid, at::sigmoid)
UNARY(Sign, at::sign)
UNARY(Silu, at::silu)
UNARY(Sin, at::sin)
UNARY(Sqrt, at::sqrt)
UNARY(Tanh, at::tanh)
UNARY(Trunc, at::trunc)
UNARY(LogicalNot, at::logical_not)
OPERATOR(Gelu, [](Tensor x, Out y) { y = at::gelu(x); })
OPERATOR(IsFinite, [](Tensor x, Out y) { y = at::isfinite(x); })
OPERATOR(IsNegInf, [](Tensor x, Out y) { y = at::isneginf(x); })
OPERATOR(IsPosInf, [](Tensor x, Out y) { y = at::isposinf(x); })
OPERATOR(IsInf, [](Tensor x, Out y) { y = at::isinf(x); })
OPERATOR(Softplus, [](Tensor x, Scalar beta, Scalar threshold, Out y) { y = at::softplus(x, beta, threshold); })

// x and y, or x and a number, and both in place.
#define BINARY(name, with_scalar, function)                                                     \
    OPERATOR(name, [](Tensor x, Tensor y, Out z) { z = function(x, y); })                       \
    OPERATOR(Inplace##name, [](Out x, Tensor y) { x = function(x.value(), y); })                \
    OPERATOR(with_scalar, [](Tensor x, Scalar y, Out z) { z = function(x, y); })                \
    OPERATOR(Inplace##with_scalar, [](Out x, Scalar y) { x = function(x.value(), y); })

BINARY(Mul, Muls, at::mul)
BINARY(Div, Divs, at::div)
BINARY(FloorDivide, FloorDivides, at::floor_divide)
BINARY(RemainderTensorTensor, RemainderTensorScalar, at::remainder)
BINARY(PowTensorTensor, PowTensorScalar, at::pow)
BINARY(BitwiseAndTensor, BitwiseAndScalar, at::bitwise_and)
BINARY(BitwiseOrTensor, BitwiseOrScalar, at::bitwise_or)
BINARY(BitwiseXorTensor, BitwiseXorScalar, at::bitwise_xor)
BINARY(EqTensor, EqScalar, at::eq)
BINARY(NeTensor, NeScalar, at::ne)
BINARY(LtTensor, LtScalar, at::lt)
BINARY(LeTensor, LeScalar, at::le)
BINARY(GtTensor, GtScalar, at::gt)
BINARY(GeTensor, GeScalar, at::ge)
BINARY(ClampMinTensor, ClampMin, at::clamp_min)
BINARY(ClampMaxTensor, ClampMax, at::clamp_max)
OPERATOR(PowScalarTensor, [](Scalar x, Tensor y, Out z) { z = at::pow(x, y); })
OPERATOR(LeftShift, [](Tensor x, Tensor y, Out z) { z = at::bitwise_left_shift(x, y); })
OPERATOR(RightShift, [](Tensor x, Tensor y, Out z) { z = at::bitwise_right_shift(x, y); })
OPERATOR(LeftShifts, [](Tensor x, Scalar y, Out z) { z = at::bitwise_left_shift(x, y); })
OPERATOR(RightShifts, [](Tensor x, Scalar y, Out z) { z = at::bitwise_right_shift(x, y); })
OPERATOR(LogicalAnd, [](Tensor x, Tensor y, Out z) { z = at::logical_and(x, y); })
OPERATOR(LogicalOr, [](Tensor x, Tensor y, Out z) { z = at::logical_or(x, y); })
OPERATOR(LogicalXor, [](Tensor x, Tensor y, Out z) { z = at::logical_xor(x, y); })
OPERATOR(Maximum, [](Tensor x, Tensor y, Out z) { z = at::maximum(x, y); })
OPERATOR(Minimum, [](Tensor x, Tensor y, Out z) { z = at::minimum(x, y); })
OPERATOR(Clamp, [](Tensor x, Maybe<Scalar> low, Maybe<Scalar> high, Out y) { y = at::clamp(x, low, high); })

// x + alpha y, and the like.
#define SCALED(name, with_scalar, function)                                                                       \
    OPERATOR(name, [](Tensor x, Tensor y, Scalar alpha, Out z) { z = function(x, y, alpha); })                    \
    OPERATOR(Inplace##name, [](Out x, Tensor y, Scalar alpha) { x = function(x.value(), y, alpha); })             \
    OPERATOR(with_scalar, [](Tensor x, Scalar y, Scalar alpha, Out z) { z = function(x, y, alpha); })             \
    OPERATOR(Inplace##with_scalar, [](Out x, Scalar y, Scalar alpha) { x = function(x.value(), y, alpha); })

SCALED(Add, Adds, at::add)
SCALED(Sub, Subs, at::sub)
SCALED(Rsub, Rsubs, at::rsub)

Tensor divided(const Tensor& quotient, int64_t mode) {
    return mode == 1 ? quotient.trunc() : mode == 2 ? quotient.floor() : quotient;
}
OPERATOR(DivMod, [](Tensor x, Tensor y, int mode, Out z) { z = divided(at::div(x, y), mode); })
OPERATOR(DivMods, [](Tensor x, Scalar y, int mode, Out z) { z = divided(at::div(x, y), mode); })
OPERATOR(InplaceDivMod, [](Out x, Tensor y, int mode) { x = divided(at::div(x.value(), y), mode); })
OPERATOR(InplaceDivMods, [](Out x, Scalar y, int mode) { x = divided(at::div(x.value(), y), mode); })

OPERATOR(SWhere, [](Tensor condition, Tensor x, Tensor y, Out z) { z = at::where(condition.to(at::kBool), x, y); })
OPERATOR(Addcmul, [](Tensor x, Tensor a, Tensor b, Scalar value, Out y) { y = at::addcmul(x, a, b, value); })
OPERATOR(Addcdiv, [](Tensor x, Tensor a, Tensor b, Scalar value, Out y) { y = at::addcdiv(x, a, b, value); })
OPERATOR(InplaceAddcmul, [](Out x, Tensor a, Tensor b, Scalar value) { x = at::addcmul(x.value(), a, b, value); })
OPERATOR(IsClose, [](Tensor x, Tensor y, double relative, double absolute, bool nan, Out close) {
    close = at::isclose(x, y, relative, absolute, nan);
})
OPERATOR(Lerp, [](Tensor x, Tensor y, Tensor weight, Out z) { z = at::lerp(x, y, weight); })
OPERATOR(InplaceLerp, [](Out x, Tensor y, Tensor weight) { x = at::lerp(x.value(), y, weight); })
OPERATOR(Lerps, [](Tensor x, Tensor y, Scalar weight, Out z) { z = at::lerp(x, y, weight); })

}  // namespace stub
