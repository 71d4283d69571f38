// The planning problem solved by LEMON's network simplex, to compare the exact solver with.
//
// Standard input, native byte order: int64 N, J, min_replicas; slots int64 [N]; weights int64 [N, J].
// Standard output: CPU seconds of the solve alone, and the largest sum of weights.
//
// The graph, the costs and the solver's copies of both are made before the clock starts.

#include <lemon/network_simplex.h>
#include <lemon/smart_graph.h>

#include <cstdint>
#include <cstdio>
#include <ctime>
#include <vector>

using Graph = lemon::SmartDigraph;
using Simplex = lemon::NetworkSimplex<Graph, std::int64_t, std::int64_t>;

static std::vector<std::int64_t> read_numbers(std::size_t count) {
  std::vector<std::int64_t> numbers(count);
  if (std::fread(numbers.data(), sizeof(std::int64_t), count, stdin) != count) std::exit(2);
  return numbers;
}

int main() {
  const auto header = read_numbers(3);
  const std::int64_t servers = header[0], pairs = header[1], replicas = header[2];
  const auto slots = read_numbers(servers);
  Graph graph;
  graph.reserveNode(servers + pairs + 1);
  graph.reserveArc(servers * pairs + servers + pairs);
  std::vector<Graph::Node> server, expert;
  for (std::int64_t n = 0; n < servers; ++n) server.push_back(graph.addNode());
  for (std::int64_t j = 0; j < pairs; ++j) expert.push_back(graph.addNode());
  const Graph::Node sink = graph.addNode();

  // A unit is a slot: it goes to an expert, or unused to the sink. What an expert receives beyond
  // its replicas flows on to the sink.
  for (std::int64_t n = 0; n < servers; ++n) {
    for (std::int64_t j = 0; j < pairs; ++j) graph.addArc(server[n], expert[j]);
    graph.addArc(server[n], sink);
  }
  for (std::int64_t j = 0; j < pairs; ++j) graph.addArc(expert[j], sink);

  Graph::NodeMap<std::int64_t> supply(graph, -replicas);
  Graph::ArcMap<std::int64_t> upper(graph, 1), cost(graph, 0);
  std::int64_t all_slots = 0, arc = 0;
  for (std::int64_t n = 0; n < servers; ++n) {
    supply[server[n]] = slots[n];
    all_slots += slots[n];
    for (const std::int64_t weight : read_numbers(pairs)) cost[graph.arcFromId(arc++)] = -weight;
    upper[graph.arcFromId(arc++)] = slots[n];
  }
  for (std::int64_t j = 0; j < pairs; ++j) upper[graph.arcFromId(arc++)] = servers;
  supply[sink] = replicas * pairs - all_slots;

  Simplex simplex(graph);
  simplex.upperMap(upper).costMap(cost).supplyMap(supply);
  const std::clock_t begin = std::clock();
  const auto status = simplex.run();
  const double seconds = double(std::clock() - begin) / CLOCKS_PER_SEC;
  if (status != Simplex::OPTIMAL) return 1;
  std::printf("%.6f %lld\n", seconds, static_cast<long long>(-simplex.totalCost()));
  return 0;
}
