// The tiled format, and products with weights of four bits.
#include "operator.h"

namespace stub {

constexpr int HALF = 1, INT32 = 3, BFLOAT16 = 27, FLOAT = 0;  // of aclDataType
constexpr int64_t LARGEST = 65535;
constexpr int64_t NIBBLES = 8;       // in an int32, the lowest first
constexpr int64_t TILE_COLUMNS = 8;  // int32 of a row of a tile: 64 numbers of four bits

OPERATOR(NpuFormatCast, [](View from, Out to) { to = from; })

// Signed numbers of four bits, [..., columns] of int32 to [..., 8 columns].
Tensor nibbles(const Tensor& packed) {
    const auto shifts = at::arange(NIBBLES, at::kInt).mul_(4);
    const auto each = at::bitwise_right_shift(packed.unsqueeze(-1), shifts).bitwise_and_(15);
    return (each - at::bitwise_and(each, 8) * 2).flatten(-2);
}

bool transposed(const aclTensor& weight) { return weight.strides[1] != 1; }

// Rows and columns of the weight in numbers of four bits.
std::pair<int64_t, int64_t> numbers(const aclTensor& weight) {
    const auto rows = weight.sizes[0], columns = weight.sizes[1];
    if (weight.dtype == INT4)
        return {rows, columns};
    return transposed(weight) ? std::pair(rows * NIBBLES, columns) : std::pair(rows, columns * NIBBLES);
}

// The weight [K, N] in int32. A tiled one is read as the card reads it, whatever tiles its descriptor claims: a matrix that
// was packed and tiled in the wrong order gives other numbers.
Tensor weight_KN(const aclTensor& weight) {
    const auto [rows, columns] = numbers(weight);
    const auto memory = [&](at::IntArrayRef sizes) { return at::from_blob(weight.data, sizes, at::kInt); };
    if (weight.format == FRACTAL_NZ) {
        const auto tiles = memory({(columns / NIBBLES + TILE_COLUMNS - 1) / TILE_COLUMNS, (rows + 15) / 16, 16, TILE_COLUMNS});
        return nibbles(rows_of_tiles(tiles)).narrow(0, 0, rows).narrow(1, 0, columns);
    }
    if (transposed(weight))
        return nibbles(memory({columns, rows / NIBBLES})).t();
    return nibbles(memory({rows, columns / NIBBLES}));
}

void check(const aclTensor* x, const aclTensor* weight, const aclTensor* scale, const aclTensor* offset,
           const aclTensor* quant_scale, const aclTensor* bias, int group, int inner_precise) {
    require(weight->dtype == INT32 || weight->dtype == INT4, "the stub knows weights of four bits only");
    require(!quant_scale, "the stub does not quantise results");
    require(x->sizes.size() == 2 && weight->sizes.size() == 2, "x and weight have two dimensions");
    require(x->dtype == HALF || x->dtype == BFLOAT16, "x is float16 or bfloat16");
    require(scale->dtype == x->dtype && (!offset || offset->dtype == x->dtype), "antiquantScale and -Offset have x's dtype");
    const auto [rows, columns] = numbers(*weight);
    require(x->sizes[1] == rows, "k of x and of weight differ");
    require(rows <= LARGEST && columns <= LARGEST, "k and n are at most 65535");
    require(group == 0 || (group % 32 == 0 && group >= 32 && group < rows), "antiquantGroupSize is a multiple of 32 below k");
    const std::vector<int64_t> groups = {group ? (rows + group - 1) / group : 1, columns};
    require(scale->sizes == groups || (!group && scale->sizes == std::vector{columns}), "antiquantScale is not [ceil(k / g), n]");
    require(!offset || offset->sizes == scale->sizes, "antiquantOffset and -Scale differ in shape");
    require(!bias || bias->dtype == (x->dtype == HALF ? HALF : FLOAT), "bias is float16 for float16, float32 for bfloat16");
    require(inner_precise == 0 || inner_precise == 1, "innerPrecise is 0 or 1");
    if (weight->format == FRACTAL_NZ) {
        require(group == 64 || group == 128, "a tiled weight takes groups of 64 or 128");
        require(!transposed(*weight), "a tiled weight is not transposed");
        require(rows % group == 0 && columns % 64 == 0, "a tiled weight takes k in whole groups and n in multiples of 64");
    }
}

// x @ ((weight + offset) scale) + bias
Tensor product(const Tensor& x, const aclTensor& weight, const Tensor& scale, const Maybe<Tensor>& offset,
               const Maybe<Tensor>& bias, int group) {
    auto matrix = weight_KN(weight).to(at::kFloat);
    const auto of_rows = [&](const Tensor& grouped) {
        return group ? grouped.repeat_interleave(group, 0).narrow(0, 0, matrix.size(0)) : grouped.reshape({1, -1});
    };
    if (offset)
        matrix = matrix + of_rows(*offset);
    const auto made = at::matmul(x, matrix * of_rows(scale));
    return bias ? made + *bias : made;
}

constexpr auto check_V2 = [](auto x, auto weight, auto scale, auto offset, auto quant_scale, auto, auto bias, int group, auto) {
    check(x, weight, scale, offset, quant_scale, bias, group, 0);
};
constexpr auto check_V3 = [](auto x, auto weight, auto scale, auto offset, auto quant_scale, auto, auto bias, int group,
                             int inner_precise, auto) {
    check(x, weight, scale, offset, quant_scale, bias, group, inner_precise);
};

CHECKED_OPERATOR(WeightQuantBatchMatmulV2, check_V2,
                 [](Tensor x, Raw weight, Tensor scale, Maybe<Tensor> offset, Maybe<View>, Maybe<View>, Maybe<Tensor> bias,
                    int group, Out y) { y = product(x, weight, scale, offset, bias, group); })
CHECKED_OPERATOR(WeightQuantBatchMatmulV3, check_V3,
                 [](Tensor x, Raw weight, Tensor scale, Maybe<Tensor> offset, Maybe<View>, Maybe<View>, Maybe<Tensor> bias,
                    int group, int, Out y) { y = product(x, weight, scale, offset, bias, group); })

}  // namespace stub

// Sizes of the memory of a tensor in a format. A row of a tile has 32 bytes of the additional dtype, which torch_npu gives as
// float16 unless told otherwise: 16 columns.
extern "C" int aclnnNpuFormatCastCalculateSizeAndFormat(const aclTensor* source, int format, int dtype, int64_t** sizes,
                                                        uint64_t* dims, int* made_format) {
    std::vector<int64_t> made = source->sizes;
    if (format == stub::FRACTAL_NZ) {
        if (made.size() < 2)
            return stub::fail(stub::REFUSED, "a tiled tensor has at least two dimensions");
        const auto rows = made[made.size() - 2], columns = made.back();
        const int64_t width = 32 / at::elementSize(stub::scalar_type(dtype == -1 ? source->dtype : dtype));
        made.resize(made.size() - 2);
        made.insert(made.end(), {(columns + width - 1) / width, (rows + 15) / 16, 16, width});
    }
    *dims = made.size();
    *sizes = new int64_t[made.size()];
    std::copy(made.begin(), made.end(), *sizes);
    *made_format = format;
    return 0;
}
