//go:build linux

package main

import (
	"slices"
	"time"
)

// quantile is a value that the given share of the sorted list does not exceed;
// 0 of an empty list.
func quantile(sorted []time.Duration, share float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(int(share*float64(len(sorted))), len(sorted)-1)]
}

// spread is what a list of values is like.
type spread struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

// spreadOf describes a list that is not empty.
func spreadOf(values []float64) spread {
	sorted := slices.Sorted(slices.Values(values))
	middle := len(sorted) / 2
	median := sorted[middle]
	if len(sorted)%2 == 0 {
		median = (sorted[middle-1] + sorted[middle]) / 2
	}
	return spread{Median: median, Min: sorted[0], Max: sorted[len(sorted)-1]}
}

// ratios divides what derpd did by what derper did just before or after, round
// by round. Rounds in which derper's value is 0 have no ratio.
func ratios(derpd, derper []float64) []float64 {
	var list []float64
	for i := range min(len(derpd), len(derper)) {
		if derper[i] != 0 {
			list = append(list, derpd[i]/derper[i])
		}
	}
	return list
}

// mean is the mean of each metric that all samples have.
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
