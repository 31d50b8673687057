// What makes, copies, gathers and scatters numbers.
#include "operator.h"

#include <ATen/CPUGeneratorImpl.h>

namespace stub {

using Indices = c10::List<std::optional<Tensor>>;

// Indices of advanced indexing: an empty tensor stands for a whole dimension.
Indices indices_of(const Tensors& tensors) {
    Indices made;
    for (const auto& tensor : tensors)
        made.push_back(tensor.numel() ? std::optional(tensor) : std::nullopt);
    return made;
}

// Making
OPERATOR(InplaceZero, [](Out x) { x.view().zero_(); })
OPERATOR(InplaceOne, [](Out x) { x.view().fill_(1); })
OPERATOR(InplaceFillScalar, [](Out x, Scalar value) { x.view().fill_(value); })
OPERATOR(InplaceFillTensor, [](Out x, View value) { x.view().fill_(value.reshape({})); })
OPERATOR(Arange, [](Scalar start, Scalar end, Scalar step, Out x) {
    const auto type = x.view().scalar_type();
    x = at::arange(start, end, step, at::TensorOptions(at::isReducedFloatingType(type) ? at::kFloat : type));
})
OPERATOR(Linspace, [](Scalar start, Scalar end, int64_t steps, Out x) { x = at::linspace(start, end, steps); })
OPERATOR(Eye, [](int64_t rows, int64_t columns, Out x) { x = at::eye(rows, columns); })
OPERATOR(Triu, [](View x, int64_t diagonal, Out y) { y = at::triu(x, diagonal); })
OPERATOR(Tril, [](View x, int64_t diagonal, Out y) { y = at::tril(x, diagonal); })
OPERATOR(InplaceTriu, [](Out x, int64_t diagonal) { x = at::triu(x.view(), diagonal); })
OPERATOR(InplaceTril, [](Out x, int64_t diagonal) { x = at::tril(x.view(), diagonal); })

// Copying
OPERATOR(InplaceCopy, [](Out to, View from) { to = from.expand(to.descriptor.sizes); })
OPERATOR(Cast, [](View x, Dtype, Out y) { y = x; })
OPERATOR(Cat, [](Views tensors, int64_t dim, Out y) { y = at::cat(Tensors(tensors), dim); })
OPERATOR(Stack, [](Views tensors, int64_t dim, Out y) { y = at::stack(Tensors(tensors), dim); })
OPERATOR(Repeat, [](View x, Ints repeats, Out y) { y = x.repeat(repeats); })
OPERATOR(RepeatInterleaveIntWithDim,
         [](View x, int64_t repeats, int64_t dim, int64_t, Out y) { y = x.repeat_interleave(repeats, dim); })
OPERATOR(Flip, [](View x, Ints dims, Out y) { y = x.flip(dims); })
OPERATOR(Roll, [](View x, Ints shifts, Ints dims, Out y) { y = x.roll(shifts, dims); })
OPERATOR(ConstantPadNd, [](View x, Ints pad, Scalar value, Out y) { y = at::constant_pad_nd(x, pad, value); })
OPERATOR(Permute, [](View x, Ints dims, Out y) { y = x.permute(dims); })

// Gathering
OPERATOR(Embedding, [](View weight, View rows, Out y) { y = weight.index_select(0, rows.reshape(-1)); })
OPERATOR(IndexSelect, [](View x, int64_t dim, View index, Out y) { y = x.index_select(dim, index); })
OPERATOR(Gather, [](View x, int64_t dim, View index, Out y) { y = x.gather(dim, index.to(at::kLong)); })
OPERATOR(Index, [](View x, Views indices, Out y) { y = at::index(x, indices_of(indices)); })
OPERATOR(Take, [](View x, View index, Out y) { y = x.take(index.to(at::kLong)); })

// Scattering
OPERATOR(InplaceIndexCopy, [](Out x, int64_t dim, View index, View source) {
    x.view().index_copy_(dim, index.to(at::kLong), source);
})
OPERATOR(InplaceIndexFill, [](Out x, int64_t dim, View index, Scalar value) {
    x.view().index_fill_(dim, index.to(at::kLong), value);
})
OPERATOR(IndexPutImpl, [](Out x, Views indices, View values, bool accumulate, bool) {
    x.view().index_put_(indices_of(indices), values, accumulate);
})
OPERATOR(IndexAdd, [](Tensor x, int64_t dim, View index, Tensor source, Scalar alpha, Out y) {
    y = at::index_add(x, dim, index.to(at::kLong), source, alpha);
})
OPERATOR(Scatter, [](View x, int64_t dim, View index, View source, int64_t reduce, Out y) {
    require(reduce == 0, "aclnnScatter with a reduction");
    y = at::scatter(x, dim, index.to(at::kLong), source);
})
OPERATOR(InplaceScatter, [](Out x, int64_t dim, View index, View source, int64_t reduce) {
    require(reduce == 0, "aclnnInplaceScatter with a reduction");
    x.view().scatter_(dim, index.to(at::kLong), source);
})
OPERATOR(ScatterValue, [](View x, int64_t dim, View index, Scalar value, int64_t reduce, Out y) {
    require(reduce == 0, "aclnnScatterValue with a reduction");
    y = at::scatter(x, dim, index.to(at::kLong), value);
})
OPERATOR(InplaceScatterValue, [](Out x, int64_t dim, View index, Scalar value, int64_t reduce) {
    require(reduce == 0, "aclnnInplaceScatterValue with a reduction");
    x.view().scatter_(dim, index.to(at::kLong), value);
})
OPERATOR(ScatterAdd, [](Tensor x, int64_t dim, View index, Tensor source, Out y) {
    y = at::scatter_add(x, dim, index.to(at::kLong), source);
})
OPERATOR(InplaceMaskedFillScalar, [](Out x, View mask, Scalar value) { x.view().masked_fill_(mask.to(at::kBool), value); })
OPERATOR(InplaceMaskedFillTensor, [](Out x, View mask, View value) {
    x.view().masked_fill_(mask.to(at::kBool), value.reshape({}));
})
// x[indices[i, :]] = updates[i]
OPERATOR(ScatterNdUpdate, [](Out x, View indices, View updates) {
    Indices each;
    for (const auto& column : indices.to(at::kLong).unbind(-1))
        each.push_back(column);
    x.view().index_put_(each, updates);
})
// Rows of a cache: x[i, …, indices[i] on `axis`, …] = updates[i]
OPERATOR(InplaceScatterUpdate, [](Out x, View indices, View updates, int64_t axis) {
    const auto starts = indices.to(at::kLong).flatten();
    const auto dim = axis < 0 ? axis + updates.dim() : axis;
    for (int64_t i = 0; i < starts.numel(); i++) {
        const auto update = updates.select(0, i);
        x.view().select(0, i).narrow(dim - 1, starts[i].item<int64_t>(), update.size(dim - 1)).copy_(update);
    }
})

// Results whose size only the card knows: written to the front of the memory, and the descriptor told.
OPERATOR(Nonzero, [](View x, Found y) { y = at::nonzero(x); })
OPERATOR(NonzeroV2, [](View x, Found y) { y = at::nonzero(x).t().contiguous(); })
OPERATOR(MaskedSelect, [](View x, View mask, Found y) { y = at::masked_select(x, mask.to(at::kBool)); })

// Random numbers: the card's own generator is another one, so only their distribution is the same.
at::Generator seeded(int64_t seed, int64_t offset) {
    return at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(seed) * 0x9e3779b97f4a7c15 + offset);
}
OPERATOR(InplaceNormal, [](Out x, float mean, float deviation, int64_t seed, int64_t offset) {
    x.view().normal_(mean, deviation, seeded(seed, offset));
})
OPERATOR(InplaceUniform, [](Out x, double from, double to, int64_t seed, int64_t offset) {
    x.view().uniform_(from, to, seeded(seed, offset));
})
OPERATOR(InplaceRandom, [](Out x, int64_t from, int64_t to, int64_t seed, int64_t offset) {
    x.view().random_(from, to, seeded(seed, offset));
})
OPERATOR(Randperm, [](int64_t count, int64_t seed, int64_t offset, Out x) { x = at::randperm(count, seeded(seed, offset)); })

}  // namespace stub
