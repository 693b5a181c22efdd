//go:build linux

package main

import "time"

// sampled is one value at a time.
type sampled struct {
	at    time.Duration
	value float64
}

// slope returns by how much the samples grow a minute, by least squares. It is 0 for
// samples of a single time.
func slope(samples []sampled) float64 {
	var n, x, y float64
	for _, s := range samples {
		n++
		x += s.at.Minutes()
		y += s.value
	}
	if n == 0 {
		return 0
	}
	x, y = x/n, y/n // means
	var covariance, variance float64
	for _, s := range samples {
		covariance += (s.at.Minutes() - x) * (s.value - y)
		variance += (s.at.Minutes() - x) * (s.at.Minutes() - x)
	}
	if variance == 0 {
		return 0
	}
	return covariance / variance
}
