//go:build linux

package main

import (
	"slices"
	"time"
)

// quantile returns the value that the given share of the sorted list does not
// exceed; 0 for an empty list.
func quantile(sorted []time.Duration, share float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(int(share*float64(len(sorted))), len(sorted)-1)]
}

// spread is the median and the range of a list of values.
type spread struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

// spreadOf returns the spread of a list that is not empty.
func spreadOf(values []float64) spread {
	sorted := slices.Sorted(slices.Values(values))
	middle := len(sorted) / 2
	median := sorted[middle]
	if len(sorted)%2 == 0 {
		median = (sorted[middle-1] + sorted[middle]) / 2
	}
	return spread{Median: median, Min: sorted[0], Max: sorted[len(sorted)-1]}
}

// ratios divides derpd's values by derper's, round by round. A round in which
// derper's value is 0 has no ratio.
func ratios(derpd, derper []float64) []float64 {
	var list []float64
	for i := range min(len(derpd), len(derper)) {
		if derper[i] != 0 {
			list = append(list, derpd[i]/derper[i])
		}
	}
	return list
}

// mean returns the mean of each metric that all samples have.
func mean(samples []sample) sample {
	out := sample{}
	for m := range samples[0] {
		values := 0
		for _, s := range samples {
			if value, found := s[m]; found {
				out[m] += value / float64(len(samples))
				values++
			}
		}
		if values < len(samples) {
			delete(out, m)
		}
	}
	return out
}
