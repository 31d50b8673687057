// What reduces, orders or normalises along dimensions.
#include "operator.h"

namespace stub {

// No dimensions at all mean all of them.
Ints dims_of(const Tensor& x, const Ints& dims) {
    if (!dims.empty())
        return dims;
    Ints all;
    for (int64_t dim = 0; dim < x.dim(); dim++)
        all.push_back(dim);
    return all;
}

OPERATOR(All, [](Tensor x, Ints dims, bool keep, Out y) { y = at::all(x, dims_of(x, dims), keep); })
OPERATOR(Any, [](Tensor x, Ints dims, bool keep, Out y) { y = at::any(x, dims_of(x, dims), keep); })
OPERATOR(Amax, [](Tensor x, Ints dims, bool keep, Out y) { y = at::amax(x, dims, keep); })
OPERATOR(Amin, [](Tensor x, Ints dims, bool keep, Out y) { y = at::amin(x, dims, keep); })
OPERATOR(Max, [](Tensor x, Out y) { y = at::max(x); })
OPERATOR(Min, [](Tensor x, Out y) { y = at::min(x); })
OPERATOR(MaxDim, [](Tensor x, int64_t dim, bool keep, Out values, Out indices) {
    auto [value, index] = at::max(x, dim, keep);
    values = value, indices = index;
})
OPERATOR(MinDim, [](Tensor x, int64_t dim, bool keep, Out values, Out indices) {
    auto [value, index] = at::min(x, dim, keep);
    values = value, indices = index;
})
OPERATOR(ArgMax, [](Tensor x, int64_t dim, bool keep, Out y) { y = at::argmax(x, dim, keep); })
OPERATOR(ArgMin, [](Tensor x, int64_t dim, bool keep, Out y) { y = at::argmin(x, dim, keep); })
OPERATOR(Mean, [](Tensor x, Ints dims, bool keep, Dtype, Out y) { y = at::mean(x, dims_of(x, dims), keep); })
OPERATOR(MeanV2, [](Tensor x, Ints dims, bool keep, bool, Dtype, Out y) { y = at::mean(x, dims_of(x, dims), keep); })
OPERATOR(ReduceSum, [](Tensor x, Ints dims, bool keep, Dtype type, Out y) {
    y = at::sum(x, dims_of(x, dims), keep, at::isReducedFloatingType(type.value) ? at::kFloat : type.value);
})
OPERATOR(Prod, [](Tensor x, Dtype, Out y) { y = at::prod(x); })
OPERATOR(ProdDim, [](Tensor x, int64_t dim, bool keep, Dtype, Out y) { y = at::prod(x, dim, keep); })
OPERATOR(Var, [](Tensor x, Ints dims, bool unbiased, bool keep, Out y) { y = at::var(x, dims_of(x, dims), unbiased, keep); })
OPERATOR(VarCorrection, [](Tensor x, Ints dims, int64_t correction, bool keep, Out y) {
    y = at::var(x, dims_of(x, dims), Scalar(correction), keep);
})
OPERATOR(Std, [](Tensor x, Ints dims, int64_t correction, bool keep, Out y) {
    y = at::std(x, dims_of(x, dims), Scalar(correction), keep);
})
OPERATOR(Norm, [](Tensor x, Scalar order, Ints dims, bool keep, Out y) { y = at::norm(x, order, dims_of(x, dims), keep); })
OPERATOR(LinalgVectorNorm, [](Tensor x, Scalar order, Ints dims, bool keep, Dtype, Out y) {
    y = at::linalg_vector_norm(x, order, dims_of(x, dims), keep);
})
OPERATOR(Cumsum, [](Tensor x, int64_t dim, Dtype, Out y) { y = at::cumsum(x, dim); })
OPERATOR(CumsumV2, [](Tensor x, int64_t dim, bool, bool, Out y) { y = at::cumsum(x, dim); })
OPERATOR(Histc, [](Tensor x, int64_t bins, Scalar low, Scalar high, Out y) {
    y = at::histc(x.to(at::kFloat), bins, low, high);  // the CPU counts no integers
})
OPERATOR(Equal, [](Tensor x, Tensor y, Out same) { same = at::scalar_tensor(at::equal(x, y), at::kBool); })

OPERATOR(Softmax, [](Tensor x, int64_t dim, Out y) { y = at::softmax(x, dim); })
OPERATOR(LogSoftmax, [](Tensor x, int64_t dim, Out y) { y = at::log_softmax(x, dim); })
OPERATOR(LogSumExp, [](Tensor x, Ints dims, bool keep, Out y) { y = at::logsumexp(x, dims, keep); })
OPERATOR(NLLLoss, [](Tensor x, View target, Maybe<Tensor> weight, int64_t reduction, int64_t ignored, Out loss, Out total) {
    auto [value, weights] = at::nll_loss_forward(x, target.to(at::kLong), weight, reduction, ignored);
    loss = value, total = weights;
})
OPERATOR(KlDiv, [](Tensor x, Tensor target, int64_t reduction, bool logs, Out loss) {
    loss = at::kl_div(x, target, reduction, logs);
})

OPERATOR(Topk, [](Tensor x, int64_t k, int64_t dim, bool largest, bool sorted, Out values, Out indices) {
    auto [value, index] = at::topk(x, k, dim, largest, sorted);
    values = value, indices = index;
})
OPERATOR(TopkV2, [](Tensor x, int64_t k, int64_t dim, bool largest, bool sorted, int64_t, Out values, Out indices) {
    auto [value, index] = at::topk(x, k, dim, largest, sorted);
    values = value, indices = index;
})
OPERATOR(Sort, [](Tensor x, bool stable, int64_t dim, bool descending, Out values, Out indices) {
    auto [value, index] = at::sort(x, stable, dim, descending);
    values = value, indices = index;
})
OPERATOR(Argsort, [](Tensor x, int64_t dim, bool descending, Out indices) { indices = at::argsort(x, dim, descending); })

}  // namespace stub
