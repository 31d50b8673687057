// Element by element.
#include "operator.h"

namespace stub {

OPERATOR(Add, [](Tensor x, Tensor y, Scalar alpha, Out sum) { sum = at::add(x, y, alpha); })
OPERATOR(Adds, [](Tensor x, Scalar y, Scalar alpha, Out sum) { sum = at::add(x, y, alpha); })
OPERATOR(Mul, [](Tensor x, Tensor y, Out product) { product = at::mul(x, y); })
OPERATOR(Muls, [](Tensor x, Scalar y, Out product) { product = at::mul(x, y); })

}  // namespace stub
