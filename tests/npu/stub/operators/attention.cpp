// Attention, rotary positions, norms and the gate of the feed-forward part, each fused into one operator.
#include "operator.h"


namespace stub {

Tensor from_layout(const Tensor& x, const std::string& layout, int64_t heads) {  // to [batch, heads, tokens, channels]
    if (layout == "BNSD")
        return x;
    if (layout == "BSND")
        return x.transpose(1, 2);
    if (layout == "BSH")
        return x.reshape({x.size(0), x.size(1), heads, -1}).transpose(1, 2);
    require(layout == "SBH", "the stub knows no attention in the layout " + layout);
    return x.reshape({x.size(0), x.size(1), heads, -1}).permute({1, 2, 0, 3});
}

Tensor to_layout(const Tensor& x, const std::string& layout) {
    if (layout == "BNSD")
        return x;
    if (layout == "BSND")
        return x.transpose(1, 2);
    if (layout == "BSH")
        return x.transpose(1, 2).flatten(2);
    require(layout == "SBH", "the stub knows no attention in the layout " + layout);
    return x.permute({2, 0, 1, 3}).flatten(2);
}

// What a query may not see: true in `mask`, or later than itself where `sparse_mode` is 2 or 3, which the card takes
// with a compressed mask.
Tensor hidden(const Maybe<View>& mask, int64_t sparse_mode, int64_t queries, int64_t keys) {
    if (sparse_mode == 2 || sparse_mode == 3)
        return at::ones({queries, keys}, at::kBool).triu(1 + (sparse_mode == 3 ? keys - queries : 0));
    require(sparse_mode == 0 || sparse_mode == 1, "the stub knows no sparse_mode " + std::to_string(sparse_mode));
    if (!mask)
        return at::zeros({queries, keys}, at::kBool);
    const auto given = mask->to(at::kBool);
    if (given.dim() == 2 && given.size(0) != queries)  // [batch, keys]
        return given.narrow(1, 0, keys).unsqueeze(1).unsqueeze(1);
    if (given.dim() == 3)  // [batch, queries, keys]
        return given.unsqueeze(1);
    return given;
}

struct Attention {
    Tensor values, maxima, sums;
};

// `query_BNSD` against keys of as many heads or of a divisor of them.
Attention attention(const Tensor& query_BNSD, Tensor key_BNTD, Tensor value_BNTD, const Tensor& hidden, double scale,
                    const Maybe<Tensor>& shift) {
    const auto shared = query_BNSD.size(1) / key_BNTD.size(1);
    key_BNTD = key_BNTD.repeat_interleave(shared, 1);
    value_BNTD = value_BNTD.repeat_interleave(shared, 1);
    auto scores = at::matmul(query_BNSD, key_BNTD.transpose(-2, -1)).mul_(scale);
    if (shift)
        scores = scores + *shift;
    scores = scores.masked_fill(hidden, -INFINITY);
    const auto maxima = scores.amax(-1, true);
    const auto weights = at::exp(scores - maxima.clamp_min(-1e30));
    const auto sums = weights.sum(-1, true);
    return {at::matmul(weights, value_BNTD) / sums.clamp_min(1e-38), maxima, sums};
}

OPERATOR(FlashAttentionScore,
         [](Tensor query, Tensor key, Tensor value, Maybe<Tensor> shift, Maybe<View>, Maybe<View>, Maybe<View> mask,
            Maybe<Ints>, double scale, double keep, int64_t, int64_t, int64_t heads, std::string layout, int64_t,
            int64_t sparse_mode, Out maxima, Out sums, Maybe<Out>, Out output) {
             require(keep == 1, "the stub drops nothing out");
             const auto q = from_layout(query, layout, heads);
             const auto channels = q.size(-1);
             const auto kv_heads = layout.back() == 'H' ? key.size(-1) / channels : heads;
             const auto k = from_layout(key, layout, kv_heads), v = from_layout(value, layout, kv_heads);
             const auto made = attention(q, k, v, hidden(mask, sparse_mode, q.size(2), k.size(2)), scale, shift);
             output = to_layout(made.values, layout);
             maxima = made.maxima.expand_as(maxima.view());
             sums = made.sums.expand_as(sums.view());
         })

// Keys or values in blocks: [blocks, tokens, channels of all heads] or [blocks, heads, tokens, channels].
Tensor from_blocks(const Tensor& blocks, const Tensor& table_BM, int64_t heads) {
    const auto tokens = blocks.dim() == 4 ? blocks.permute({0, 2, 1, 3})
                                          : blocks.reshape({blocks.size(0), blocks.size(1), heads, -1});
    std::vector<Tensor> sequences;
    for (const auto& row : table_BM.to(at::kLong).unbind(0))
        sequences.push_back(tokens.index_select(0, row.clamp_min(0)).flatten(0, 1).transpose(0, 1));
    return at::stack(sequences);
}

struct Inference {  // of both versions of the operator
    Tensor query;
    Tensors key, value;
    Maybe<Tensor> shift;
    Maybe<View> mask;
    Maybe<Ints> key_lengths;
    Maybe<View> block_table;
    int64_t heads, kv_heads;
    double scale;
    std::string layout;
    int64_t sparse_mode;
};

void infer(const Inference& given, const Out& output, const Out& log_sum, bool wants_log_sum) {
    const auto separator = given.layout.find('_');
    const auto layout = given.layout.substr(0, separator);
    const auto heads = given.heads, kv_heads = given.kv_heads ? given.kv_heads : heads;
    const auto q = from_layout(given.query, layout, heads);
    require(given.key.size() == 1, "the stub takes the keys of a batch as one tensor");
    const bool in_blocks = given.block_table.has_value();
    const auto k = in_blocks ? from_blocks(given.key[0], *given.block_table, kv_heads) : from_layout(given.key[0], layout, kv_heads);
    const auto v = in_blocks ? from_blocks(given.value[0], *given.block_table, kv_heads) : from_layout(given.value[0], layout, kv_heads);
    auto unseen = hidden(given.mask, given.sparse_mode, q.size(2), k.size(2));
    if (given.key_lengths && !given.key_lengths->empty()) {
        const auto ends = at::tensor(*given.key_lengths).reshape({-1, 1, 1, 1});
        unseen = unseen.logical_or(at::arange(k.size(2)) >= ends);
    }
    const auto made = attention(q, k, v, unseen, given.scale, given.shift);
    output = to_layout(made.values, separator == std::string::npos ? layout : given.layout.substr(separator + 1));
    if (wants_log_sum)
        log_sum = made.maxima + made.sums.log();
}

using No = Maybe<View>;  // of what the stub does not compute: quantised or rotated keys, shared prefixes, padding
bool none(std::initializer_list<std::reference_wrapper<const No>> given) {
    for (const No& each : given)
        if (each)
            return false;
    return true;
}
constexpr auto ONLY_PLAIN = "the stub computes attention without quantised or rotated keys, prefixes and padding";

OPERATOR(FusedInferAttentionScoreV3,
         [](Tensor query, Tensors key, Tensors value, Maybe<Tensor> shift, Maybe<View> mask, Maybe<Ints>, Maybe<Ints> lengths,
            No a, No b, No c, No d, No e, No f, No g, No block_table, No h, No i, No j, No k, No l, No m, No n, No o,
            Maybe<Ints>, No p, No q, No r, int64_t heads, double scale, int64_t, int64_t, std::string layout,
            int64_t kv_heads, int64_t sparse_mode, int64_t, int64_t, int64_t, bool wants_log_sum, int64_t, int64_t,
            Out output, Out log_sum) {
             require(none({a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r}), ONLY_PLAIN);
             infer({query, key, value, shift, mask, lengths, block_table, heads, kv_heads, scale, layout, sparse_mode},
                   output, log_sum, wants_log_sum);
         })
OPERATOR(FusedInferAttentionScoreV4,
         [](Tensor query, Tensors key, Tensors value, Maybe<Tensor> shift, Maybe<View> mask, Maybe<Ints>, Maybe<Ints> lengths,
            No a, No b, No c, No d, No e, No f, No g, No block_table, No h, No i, No j, No k, No l, No m, No n, No o,
            Maybe<Ints>, No p, No q, No r, No s, No t, int64_t heads, double scale, int64_t, int64_t, std::string layout,
            int64_t kv_heads, int64_t sparse_mode, int64_t, int64_t, int64_t, bool wants_log_sum, int64_t, int64_t,
            int64_t, Out output, Out log_sum) {
             require(none({a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t}), ONLY_PLAIN);
             infer({query, key, value, shift, mask, lengths, block_table, heads, kv_heads, scale, layout, sparse_mode},
                   output, log_sum, wants_log_sum);
         })

OPERATOR(PromptFlashAttentionV3,
         [](Tensor query, Tensor key, Tensor value, Maybe<Tensor> shift, Maybe<View> mask, Maybe<Ints>, Maybe<Ints> lengths,
            No a, No b, No c, No d, No e, int64_t heads, double scale, int64_t, int64_t, std::string layout,
            int64_t kv_heads, int64_t sparse_mode, int64_t, Out output) {
             require(none({a, b, c, d, e}), ONLY_PLAIN);
             infer({query, {key}, {value}, shift, mask, lengths, {}, heads, kv_heads, scale, layout, sparse_mode}, output,
                   output, false);
         })
OPERATOR(IncreFlashAttentionV4,
         [](Tensor query, Tensors key, Tensors value, Maybe<Tensor> shift, Maybe<View> mask, Maybe<Ints> lengths, No a, No b,
            No c, No d, No e, No f, No g, No block_table, No h, int64_t heads, double scale, std::string layout,
            int64_t kv_heads, int64_t, int64_t, Out output) {
             require(none({a, b, c, d, e, f, g, h}), ONLY_PLAIN);
             infer({query, key, value, shift, mask, lengths, block_table, heads, kv_heads, scale, layout, 0}, output, output,
                   false);
         })

// Rotary positions

Tensor half_rotated(const Tensor& x) {
    const auto halves = x.chunk(2, -1);
    return at::cat({-halves[1], halves[0]}, -1);
}
Tensor neighbours_rotated(const Tensor& x) {
    return at::stack({-x.slice(-1, 1, std::nullopt, 2), x.slice(-1, 0, std::nullopt, 2)}, -1).flatten(-2);
}
Tensor rotated(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved) {
    return x * cos + (interleaved ? neighbours_rotated(x) : half_rotated(x)) * sin;
}
OPERATOR(RotaryPositionEmbedding, [](Tensor x, Tensor cos, Tensor sin, int64_t mode, Out y) {
    require(mode == 0 || mode == 1, "the stub rotates halves or neighbours");
    y = rotated(x, cos, sin, mode == 1);
})
OPERATOR(RotaryPositionEmbeddingV2, [](Tensor x, Tensor cos, Tensor sin, int64_t mode, Maybe<Tensor> rotation, Out y) {
    require((mode == 0 || mode == 1) && !rotation, "the stub rotates halves or neighbours");
    y = rotated(x, cos, sin, mode == 1);
})
OPERATOR(ApplyRotaryPosEmb, [](Out query, Out key, Tensor cos, Tensor sin, int64_t) {
    query = rotated(query.value(), cos, sin, false), key = rotated(key.value(), cos, sin, false);
})
OPERATOR(ApplyRotaryPosEmbV2, [](Out query, Out key, Tensor cos, Tensor sin, int64_t, std::string mode) {
    require(mode == "half" || mode == "interleave", "the stub rotates halves or neighbours");
    const bool interleaved = mode == "interleave";
    query = rotated(query.value(), cos, sin, interleaved), key = rotated(key.value(), cos, sin, interleaved);
})

// Norms and gates

void rms_norm(const Tensor& x, const Tensor& gamma, double epsilon, const Out& y, const Out& deviation) {
    const auto inverse = at::rsqrt(x.square().mean(-1, true) + epsilon);
    y = x * inverse * gamma;
    deviation = inverse;
}
OPERATOR(RmsNorm, [](Tensor x, Tensor gamma, double epsilon, Out y, Out deviation) { rms_norm(x, gamma, epsilon, y, deviation); })
OPERATOR(AddRmsNorm, [](Tensor x, Tensor added, Tensor gamma, double epsilon, Out y, Out deviation, Out sum) {
    sum = x + added;
    rms_norm(sum.value(), gamma, epsilon, y, deviation);
})
OPERATOR(LayerNorm, [](Tensor x, Ints shape, Maybe<Tensor> weight, Maybe<Tensor> bias, double epsilon, Out y, Out mean,
                       Out deviation) {
    const auto [made, means, inverses] = at::native_layer_norm(x, shape, weight, bias, epsilon);
    y = made, mean = means, deviation = inverses;
})
OPERATOR(SwiGlu, [](Tensor x, int64_t dim, Out y) {
    const auto halves = x.chunk(2, dim);
    y = at::silu(halves[0]) * halves[1];
})

}  // namespace stub
