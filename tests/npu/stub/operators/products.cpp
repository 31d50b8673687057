// Products of matrices.
#include "operator.h"

namespace stub {

// The last argument of each says how exactly the card's cube unit computes float32; here it always does so in full.

OPERATOR(Matmul, [](Tensor x, Tensor y, Out z, int8_t) { z = at::matmul(x, y); })
OPERATOR(MatmulWeightNz, [](Tensor x, Tensor y, Out z, int8_t) { z = at::matmul(x, y); })
OPERATOR(Mm, [](Tensor x, Tensor y, Out z, int8_t) { z = at::mm(x, y); })
OPERATOR(Mv, [](Tensor x, Tensor y, Out z, int8_t) { z = at::mv(x, y); })
OPERATOR(Dot, [](Tensor x, Tensor y, Out z) { z = at::dot(x, y); })
OPERATOR(Ger, [](Tensor x, Tensor y, Out z) { z = at::ger(x, y); })
OPERATOR(BatchMatMul, [](Tensor x, Tensor y, Out z, int8_t) { z = at::bmm(x, y); })
OPERATOR(Addmm, [](Tensor sum, Tensor x, Tensor y, Scalar beta, Scalar alpha, Out z, int8_t) {
    z = at::addmm(sum, x, y, beta, alpha);
})
OPERATOR(AddmmWeightNz, [](Tensor sum, Tensor x, Tensor y, Scalar beta, Scalar alpha, Out z, int8_t) {
    z = at::addmm(sum, x, y, beta, alpha);
})
OPERATOR(InplaceAddmm, [](Out sum, Tensor x, Tensor y, Scalar beta, Scalar alpha, int8_t) {
    sum = at::addmm(sum.value(), x, y, beta, alpha);
})
OPERATOR(Addmv, [](Tensor sum, Tensor x, Tensor y, Scalar alpha, Scalar beta, Out z, int8_t) {
    z = at::addmv(sum, x, y, beta, alpha);
})
OPERATOR(Baddbmm, [](Tensor sum, Tensor x, Tensor y, Scalar beta, Scalar alpha, Out z, int8_t) {
    z = at::baddbmm(sum, x, y, beta, alpha);
})
OPERATOR(InplaceBaddbmm, [](Out sum, Tensor x, Tensor y, Scalar beta, Scalar alpha, int8_t) {
    sum = at::baddbmm(sum.value(), x, y, beta, alpha);
})
OPERATOR(InplaceAddr, [](Out sum, Tensor x, Tensor y, Scalar beta, Scalar alpha) {
    sum = at::addr(sum.value(), x, y, beta, alpha);
})
OPERATOR(TriangularSolve, [](Tensor b, Tensor a, bool upper, bool transposed, bool unit, Out x, Out copy) {
    x = std::get<0>(at::triangular_solve(b, a, upper, transposed, unit));
    copy = a;
})

}  // namespace stub
