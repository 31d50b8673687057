// A stub of the Ascend driver and runtime: cards, contexts, memory, streams, events and graphs, all in memory of the host.
//
// STUB_CARDS   how many cards there are (2)
// STUB_MEMORY  bytes of memory of each (64 GiB)
// STUB_SOC     name of the chip (Ascend910B1)
// STUB_CANN    version of CANN (9.1.0)
// STUB_LOG     a file that gets a line for each context, allocation, copy, launch and graph
// STUB_STRICT  makes an operator that the stub cannot compute an error
#include "stub.h"

#include <acl/acl.h>
#include <acl/acl_rt.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <vector>

namespace {

constexpr int NO_CONTEXT = ACL_ERROR_RT_CONTEXT_NULL;
constexpr int OUT_OF_MEMORY = ACL_ERROR_RT_MEMORY_ALLOCATION;
constexpr size_t POISONED_BYTES = 64 << 20;  // larger blocks are left untouched, so that they take no memory until used

std::string setting(const char* name, const char* otherwise) {
    const char* value = getenv(name);
    return value ? value : otherwise;
}

int64_t number(const char* name, int64_t otherwise) {
    const char* value = getenv(name);
    return value ? atoll(value) : otherwise;
}

int cards() {
    static const int count = number("STUB_CARDS", 2);
    return count;
}

struct Graph {
    std::vector<std::function<void()>> work;
};

struct Stream {
    int card;
    int id;
    std::shared_ptr<Graph> captured;  // null unless the stream is being captured
};

struct Event {
    std::atomic<int64_t> nanoseconds{0};
    std::shared_ptr<Graph> captured;  // the graph of the stream that recorded it
};

struct Block {
    size_t bytes;
    int card;
};

std::mutex mutex;
std::map<uintptr_t, Block> memory;   // by address
std::map<int, size_t> used_bytes;    // by card
std::set<int> contexts;              // cards that this process has a context on
std::set<Stream*> streams;
std::map<Graph*, std::shared_ptr<Graph>> graphs;  // captured, until they are destroyed
thread_local int current = -1;       // the card of this thread; -1 without a context
thread_local std::string last_error;

int64_t now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

void log_event(const char* event, int card, const std::string& more = "") {
    if (stub::logs())
        stub::log("\"event\": \"" + std::string(event) + "\", \"card\": " + std::to_string(card) + more);
}

std::string bytes(size_t count) { return ", \"bytes\": " + std::to_string(count); }

int open_context(int card) {
    if (card < 0 || card >= cards())
        return stub::fail(ACL_ERROR_RT_INVALID_DEVICEID, "there is no card " + std::to_string(card));
    current = card;
    std::lock_guard lock(mutex);
    if (contexts.insert(card).second)
        log_event("context", card);
    return ACL_SUCCESS;
}

int new_stream(aclrtStream* stream) {
    if (current < 0)
        return NO_CONTEXT;
    static std::atomic<int> ids{0};
    auto* made = new Stream{current, ++ids, nullptr};
    std::lock_guard lock(mutex);
    streams.insert(made);
    *stream = made;
    return ACL_SUCCESS;
}

int delete_stream(aclrtStream stream) {
    std::lock_guard lock(mutex);
    streams.erase(static_cast<Stream*>(stream));
    delete static_cast<Stream*>(stream);
    return ACL_SUCCESS;
}

// A wait of the host for a stream that is being captured: on a card it ends the capture with this error.
int refuse_while_capturing(aclrtStream stream) {
    auto* waited = static_cast<Stream*>(stream);
    if (waited && waited->captured)
        return stub::fail(ACL_ERROR_RT_STREAM_CAPTURED, "the host waits for a stream that is being captured");
    return ACL_SUCCESS;
}

int refuse_while_capturing() {
    std::lock_guard lock(mutex);
    for (auto* stream : streams)
        if (stream->captured)
            return stub::fail(ACL_ERROR_RT_STREAM_CAPTURED, "the host waits while a stream is being captured");
    return ACL_SUCCESS;
}

int copy(void* to, const void* from, size_t count, void* stream) {
    const int card = stream ? stub::card_of_stream(stream) : current;
    log_event("copy", card,
              bytes(count) + ", \"to\": " + std::to_string(stub::card_of_memory(to)) +
                  ", \"from\": " + std::to_string(stub::card_of_memory(from)));
    stub::submit(stream, [=] { memmove(to, from, count); });
    return ACL_SUCCESS;
}

}  // namespace

namespace stub {

bool logs() {
    static const bool wanted = getenv("STUB_LOG") != nullptr;
    return wanted;
}

void log(const std::string& fields) {
    if (!logs())
        return;
    // Several processes append to one file: each line is one write.
    static const int file = open(getenv("STUB_LOG"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    const std::string line = "{" + fields + ", \"process\": " + std::to_string(getpid()) + "}\n";
    if (write(file, line.data(), line.size()) < 0)
        perror("STUB_LOG");
}

void submit(void* stream, std::function<void()> work) {
    auto* on = static_cast<Stream*>(stream);
    if (on && on->captured)
        on->captured->work.push_back(std::move(work));
    else
        work();
}

int card_of_stream(void* stream) { return stream ? static_cast<Stream*>(stream)->card : current; }

int card_of_memory(const void* address) {
    const auto place = reinterpret_cast<uintptr_t>(address);
    std::lock_guard lock(mutex);
    auto after = memory.upper_bound(place);
    if (after == memory.begin())
        return -1;
    const auto& [start, block] = *std::prev(after);
    return place < start + block.bytes ? block.card : -1;
}

int fail(int code, const std::string& message) {
    last_error = "[stub] " + message;
    return code;
}

int not_computed(const char* name) {
    log_event("launch", current, ", \"operator\": \"" + std::string(name) + "\", \"computed\": false");
    static const bool refused = getenv("STUB_STRICT") != nullptr;
    return refused ? fail(ACL_ERROR_INVALID_PARAM, std::string("NOT COMPUTED: the stub has no kernel for ") + name) : 0;
}

}  // namespace stub

extern "C" {

// Cards and contexts

const char* aclGetRecentErrMsg() { return last_error.c_str(); }

const char* aclrtGetSocName() {
    static const std::string name = setting("STUB_SOC", "Ascend910B1");
    return name.c_str();
}

int aclsysGetCANNVersion(aclCANNPackageName, aclCANNPackageVersion* version) {
    static const std::string text = setting("STUB_CANN", "9.1.0");
    memset(version, 0, sizeof *version);
    text.copy(version->version, sizeof version->version - 1);
    return ACL_SUCCESS;
}

int aclrtGetDeviceCount(uint32_t* count) {
    *count = cards();
    return ACL_SUCCESS;
}

int aclrtSetDevice(int32_t card) { return open_context(card); }

int aclrtGetDevice(int32_t* card) {
    if (current < 0)
        return NO_CONTEXT;
    *card = current;
    return ACL_SUCCESS;
}

int aclrtGetCurrentContext(aclrtContext* context) {
    *context = reinterpret_cast<void*>(static_cast<intptr_t>(current + 1));
    return current < 0 ? NO_CONTEXT : ACL_SUCCESS;
}

int aclrtSetCurrentContext(aclrtContext context) {
    return open_context(static_cast<int>(reinterpret_cast<intptr_t>(context)) - 1);
}

int aclrtGetPrimaryCtxState(int32_t card, uint32_t* flags, int32_t* active) {
    std::lock_guard lock(mutex);
    *flags = 0;
    *active = contexts.count(card);
    return ACL_SUCCESS;
}

int aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) {
    *can = 1;
    return ACL_SUCCESS;
}

// 24 of whatever is counted: cores of each kind, limits of streams.
int aclGetDeviceCapability(uint32_t, aclDeviceInfo, int64_t* value) { return *value = 24, ACL_SUCCESS; }
int aclrtGetDeviceInfo(uint32_t, aclrtDevAttr, int64_t* value) { return *value = 24, ACL_SUCCESS; }
int aclrtGetStreamResLimit(aclrtStream, aclrtDevResLimitType, uint32_t* value) { return *value = 24, ACL_SUCCESS; }
int aclrtGetDeviceResLimit(int32_t, aclrtDevResLimitType, uint32_t* value) { return *value = 24, ACL_SUCCESS; }
int aclrtGetResInCurrentThread(aclrtDevResLimitType, uint32_t* value) { return *value = 24, ACL_SUCCESS; }
int aclrtGetSysParamOpt(aclSysParamOpt, int64_t* value) { return *value = 0, ACL_SUCCESS; }
int aclrtCtxGetSysParamOpt(aclSysParamOpt, int64_t* value) { return *value = 0, ACL_SUCCESS; }

// Memory

int aclrtMalloc(void** address, size_t count, aclrtMemMallocPolicy) {
    if (current < 0)
        return NO_CONTEXT;
    static const size_t total = number("STUB_MEMORY", int64_t{64} << 30);
    {
        std::lock_guard lock(mutex);
        if (used_bytes[current] + count > total)
            return stub::fail(OUT_OF_MEMORY, "card " + std::to_string(current) + " is full");
        used_bytes[current] += count;
    }
    if (posix_memalign(address, 512, std::max<size_t>(count, 512)))
        return OUT_OF_MEMORY;
    if (count <= POISONED_BYTES)
        memset(*address, 0xff, count);  // NaN in every float: what reads memory that nobody wrote is seen
    {
        std::lock_guard lock(mutex);
        memory[reinterpret_cast<uintptr_t>(*address)] = {count, current};
    }
    log_event("allocate", current, bytes(count));
    return ACL_SUCCESS;
}

int aclrtMallocAlign32(void** address, size_t count, aclrtMemMallocPolicy policy) {
    return aclrtMalloc(address, count, policy);
}

int aclrtFree(void* address) {
    {
        std::lock_guard lock(mutex);
        auto found = memory.find(reinterpret_cast<uintptr_t>(address));
        if (found == memory.end())
            return ACL_ERROR_INVALID_PARAM;
        used_bytes[found->second.card] -= found->second.bytes;
        memory.erase(found);
    }
    free(address);
    return ACL_SUCCESS;
}

int aclrtGetMemInfo(aclrtMemAttr, size_t* free, size_t* total) {
    if (current < 0)
        return NO_CONTEXT;
    std::lock_guard lock(mutex);
    *total = number("STUB_MEMORY", int64_t{64} << 30);
    *free = *total - used_bytes[current];
    return ACL_SUCCESS;
}

int aclrtMallocHost(void** address, size_t count) {
    return posix_memalign(address, 512, std::max<size_t>(count, 512)) ? OUT_OF_MEMORY : ACL_SUCCESS;
}

int aclrtMallocHostWithCfg(void** address, uint64_t count, aclrtMallocConfig*) {
    return aclrtMallocHost(address, count);
}

int aclrtFreeHost(void* address) {
    free(address);
    return ACL_SUCCESS;
}

int aclrtPointerGetAttributes(const void* address, aclrtPtrAttributes* attributes) {
    const int card = stub::card_of_memory(address);
    memset(attributes, 0, sizeof *attributes);
    attributes->location.id = std::max(card, 0);
    attributes->location.type = card < 0 ? ACL_MEM_LOCATION_TYPE_UNREGISTERED : ACL_MEM_LOCATION_TYPE_DEVICE;
    return ACL_SUCCESS;
}

// Memory that grows in place (expandable_segments) is not offered: torch_npu then takes ordinary blocks.
int aclrtReserveMemAddress(void**, size_t, size_t, void*, uint64_t) { return ACL_ERROR_RT_FEATURE_NOT_SUPPORT; }

int aclrtMemcpy(void* to, size_t, const void* from, size_t count, aclrtMemcpyKind) {
    if (int refused = refuse_while_capturing())
        return refused;
    return copy(to, from, count, nullptr);
}

int aclrtMemcpyAsync(void* to, size_t, const void* from, size_t count, aclrtMemcpyKind, aclrtStream stream) {
    return copy(to, from, count, stream);
}

int aclrtMemset(void* at, size_t, int32_t value, size_t count) {
    memset(at, value, count);
    return ACL_SUCCESS;
}

int aclrtMemsetAsync(void* at, size_t, int32_t value, size_t count, aclrtStream stream) {
    stub::submit(stream, [=] { memset(at, value, count); });
    return ACL_SUCCESS;
}

// Streams and events

int aclrtCreateStream(aclrtStream* stream) { return new_stream(stream); }
int aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) { return new_stream(stream); }
int aclrtDestroyStream(aclrtStream stream) { return delete_stream(stream); }
int aclrtDestroyStreamForce(aclrtStream stream) { return delete_stream(stream); }
int aclrtSynchronizeStream(aclrtStream stream) { return refuse_while_capturing(stream); }
int aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t) { return refuse_while_capturing(stream); }
int aclrtSynchronizeDevice() { return refuse_while_capturing(); }
int aclrtSynchronizeDeviceWithTimeout(int32_t) { return refuse_while_capturing(); }

int aclrtStreamQuery(aclrtStream, aclrtStreamStatus* status) {
    *status = ACL_STREAM_STATUS_COMPLETE;
    return ACL_SUCCESS;
}

int aclrtStreamGetId(aclrtStream stream, int32_t* id) {
    *id = static_cast<Stream*>(stream)->id;
    return ACL_SUCCESS;
}

int aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t) {
    *event = new Event;
    return ACL_SUCCESS;
}

int aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t flag) { return aclrtCreateEventExWithFlag(event, flag); }

int aclrtDestroyEvent(aclrtEvent event) {
    delete static_cast<Event*>(event);
    return ACL_SUCCESS;
}

int aclrtRecordEvent(aclrtEvent event, aclrtStream stream) {
    auto* recorded = static_cast<Event*>(event);
    recorded->captured = stream ? static_cast<Stream*>(stream)->captured : nullptr;
    recorded->nanoseconds = now();
    return ACL_SUCCESS;
}

// A stream that waits for an event of a captured stream is captured into the same graph.
int aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event) {
    auto* waits = static_cast<Stream*>(stream);
    if (auto graph = static_cast<Event*>(event)->captured; waits && graph)
        waits->captured = graph;
    return ACL_SUCCESS;
}

int aclrtQueryEventStatus(aclrtEvent, aclrtEventRecordedStatus* status) {
    *status = ACL_EVENT_RECORDED_STATUS_COMPLETE;
    return ACL_SUCCESS;
}

int aclrtQueryEventWaitStatus(aclrtEvent, aclrtEventWaitStatus* status) {
    *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
    return ACL_SUCCESS;
}

int aclrtEventElapsedTime(float* milliseconds, aclrtEvent from, aclrtEvent to) {
    *milliseconds = (static_cast<Event*>(to)->nanoseconds - static_cast<Event*>(from)->nanoseconds) / 1e6f;
    return ACL_SUCCESS;
}

int aclrtEventGetTimestamp(aclrtEvent event, uint64_t* microseconds) {
    *microseconds = static_cast<Event*>(event)->nanoseconds / 1000;
    return ACL_SUCCESS;
}

// Graphs

int aclmdlRICaptureBegin(aclrtStream stream, aclmdlRICaptureMode) {
    auto* begun = static_cast<Stream*>(stream);
    if (!begun || begun->captured)
        return stub::fail(ACL_ERROR_RT_STREAM_CAPTURED, "the stream is being captured already");
    begun->captured = std::make_shared<Graph>();
    log_event("capture", begun->card);
    return ACL_SUCCESS;
}

int aclmdlRICaptureGetInfo(aclrtStream stream, aclmdlRICaptureStatus* status, aclmdlRI* graph) {
    auto* asked = static_cast<Stream*>(stream);
    const bool active = asked && asked->captured;
    *status = active ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE : ACL_MODEL_RI_CAPTURE_STATUS_NONE;
    *graph = active ? asked->captured.get() : nullptr;
    return ACL_SUCCESS;
}

int aclmdlRICaptureEnd(aclrtStream stream, aclmdlRI* graph) {
    auto captured = static_cast<Stream*>(stream)->captured;
    if (!captured)
        return stub::fail(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "the stream is not being captured");
    std::lock_guard lock(mutex);
    for (auto* other : streams)
        if (other->captured == captured)
            other->captured = nullptr;
    *graph = captured.get();
    graphs[captured.get()] = std::move(captured);
    return ACL_SUCCESS;
}

int aclmdlRIExecuteAsync(aclmdlRI graph, aclrtStream stream) {
    log_event("replay", stub::card_of_stream(stream),
              ", \"launches\": " + std::to_string(static_cast<Graph*>(graph)->work.size()));
    for (const auto& work : static_cast<Graph*>(graph)->work)
        work();
    return ACL_SUCCESS;
}

int aclmdlRIDestroy(aclmdlRI graph) {
    std::lock_guard lock(mutex);
    return graphs.erase(static_cast<Graph*>(graph)) ? ACL_SUCCESS : ACL_ERROR_INVALID_PARAM;
}

// Operators of the old interface, compiled at first use: none computes.

aclopAttr* aclopCreateAttr() { return static_cast<aclopAttr*>(malloc(1)); }
void aclopDestroyAttr(const aclopAttr* attributes) { free(const_cast<aclopAttr*>(attributes)); }
aclDataBuffer* aclCreateDataBuffer(void*, size_t) { return static_cast<aclDataBuffer*>(malloc(1)); }
int aclDestroyDataBuffer(const aclDataBuffer* buffer) { return free(const_cast<aclDataBuffer*>(buffer)), ACL_SUCCESS; }
void aclDestroyTensorDesc(const aclTensorDesc* description) { free(const_cast<aclTensorDesc*>(description)); }

aclTensorDesc* aclCreateTensorDesc(aclDataType, int, const int64_t*, aclFormat) {
    return static_cast<aclTensorDesc*>(malloc(1));
}

int aclopCompileAndExecute(const char* name, ...) { return stub::not_computed(name); }
int aclopCompileAndExecuteV2(const char* name, ...) { return stub::not_computed(name); }
size_t aclGetCompileoptSize(int) { return 32; }
int aclGetCompileopt(int, char* value, size_t length) { return strncpy(value, "disable", length), ACL_SUCCESS; }

}  // extern "C"
