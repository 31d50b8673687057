// What the two halves of the stub share: the driver (driver.cpp, libascendcl.so) and the operators (operators/, libopapi.so).
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace stub {

// Append one line to the file that STUB_LOG names: a JSON object of `fields`, such as `"event": "launch", "card": 0`.
// Nothing happens where the variable is not set.
void log(const std::string& fields);
bool logs();

// Give `work` to a stream: run now, or kept in the graph that the stream is being captured into.
// Streams of a real card run later. Running at once is one of the orders that it may take, since what a stream waits for
// has always been submitted before.
void submit(void* stream, std::function<void()> work);

// The number of the card that a stream belongs to, or whose memory an address lies in; -1 for memory of the host.
int card_of_stream(void* stream);
int card_of_memory(const void* address);

// Remember what went wrong, for aclGetRecentErrMsg, and return `code`.
int fail(int code, const std::string& message);

// Log the launch of an operator that nothing here computes: what it would have written stays as it was.
// An error where STUB_STRICT is set.
int not_computed(const char* name);

}  // namespace stub
